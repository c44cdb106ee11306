"""Remove nodes that change nothing.

    %t = aten.to.dtype(%x, torch.float32)                 ->   %x        (x is float32 already)
    %s = aten.slice(%x, 1, 0, 9223372036854775807)        ->   %x
    %b = aten.transpose(aten.transpose(%x, 1, 2), 1, 2)   ->   %x
    aten._assert_tensor_metadata(%x, ...)                 ->   (nothing)

Also multiplication by 1, addition of 0, squeeze of unsqueeze, views and expands to the same shape,
contiguous, detach, alias, clone and dropout outside training. A copy that changes the layout stays
(a view may need it), and so do all copies in a graph that writes to tensors.

Level: captured -> captured. Numerics: exact.
"""

from __future__ import annotations

import torch
from torch import fx

from xllm.graph import calls_of
from xllm.passes.core import ModelFacts, PassContext
from xllm.passes.rewrite import full_args, mutates
from xllm.torch_private import same_type

aten = torch.ops.aten

#: Identity whenever input and output have the same dtype and shape.
_SAME_TYPE = {
    aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default, aten.view.default,
    aten.reshape.default, aten.expand.default, aten.slice.Tensor, aten.contiguous.default,
    aten.detach.default, aten.alias.default, aten.clone.default, aten.lift_fresh_copy.default,
}
_COPIES = {aten.contiguous.default, aten.clone.default, aten._to_copy.default,
           aten.lift_fresh_copy.default}
_CHECKS = {aten._assert_tensor_metadata.default, aten._assert_scalar.default,
           aten.sym_constrain_range_for_size.default}
_NEUTRAL = {aten.mul.Tensor: 1, aten.div.Tensor: 1, aten.add.Tensor: 0, aten.sub.Tensor: 0}
_INVERSE = {aten.transpose.int: aten.transpose.int, aten.squeeze.dim: aten.unsqueeze.default,
            aten.unsqueeze.default: aten.squeeze.dim}


def _copy_matters(node: fx.Node, source: fx.Node) -> bool:
    """Whether the memory of a copy, not its values alone, may matter to anybody."""
    layouts = [str(n.meta["val"].stride()) for n in (node, source)]  # compares without guards
    return layouts[0] != layouts[1] or any(mutates(n) for n in node.graph.nodes)


def _source(node: fx.Node) -> fx.Node | None:
    """The earlier node that has the same value, if this one changes nothing."""
    args = full_args(node)
    x = args[0]
    if node.target in _SAME_TYPE and same_type(x.meta["val"], node.meta["val"]):
        return None if node.target in _COPIES and _copy_matters(node, x) else x
    if node.target in _NEUTRAL and args[1] == _NEUTRAL[node.target]:
        return x if same_type(x.meta["val"], node.meta["val"]) else None
    if node.target is aten.dropout.default and (args[1] == 0 or not args[2]):
        return x
    if node.target in _INVERSE and isinstance(x, fx.Node) and x.target is _INVERSE[node.target]:
        inner = full_args(x)
        if set(inner[1:]) == set(args[1:]) and same_type(inner[0].meta["val"], node.meta["val"]):
            return inner[0]
    return None


def drop_noops(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Remove nodes that change nothing."""
    sites = 0
    for node in calls_of(gm, *_CHECKS):
        gm.graph.erase_node(node)
        sites += 1
    for node in calls_of(gm, *_SAME_TYPE, *_NEUTRAL, *_INVERSE, aten.dropout.default):
        source = _source(node)
        if source is not None:
            node.replace_all_uses_with(source)
            gm.graph.erase_node(node)
            sites += 1
    return sites


def expected(model: ModelFacts, ctx: PassContext) -> int | None:
    return None
