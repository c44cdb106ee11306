"""Give values the size of keys, as the paged cache stores them.

    %o = xllm.attention(%q, %k, %v, ...)   with v narrower than k
    ->   %z = aten.zeros_like(aten.slice(%k, 3, V, D)); %p = aten.cat([%v, %z], 3)
         %a = xllm.attention(%q, %k, %p, ...); %o = aten.slice(%a, 3, 0, V)

A cache row then has one size for both (MiMo-V2: 192 and 128). Latent attention, which differs more
often, has been absorbed before. (``constant_pad_nd`` would fix the number of tokens while typed.)

Level: canonical -> canonical. Numerics: exact (zeros add nothing).
"""

from __future__ import annotations

import torch
from torch import fx

from xllm.graph import calls_of, retype
from xllm.passes.core import ModelFacts, PassContext

aten = torch.ops.aten
xllm = torch.ops.xllm


def pad_values(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Give values the size of keys, as the paged cache stores them."""
    sites = 0
    for node in calls_of(gm, xllm.attention.default):
        _, k, v = (n.meta["val"].shape[-1] for n in node.args[:3])
        if v >= k:
            continue
        mode = node.meta["val"].fake_mode
        with gm.graph.inserting_before(node):
            rest = gm.graph.call_function(aten.slice.Tensor, (node.args[1], 3, v, k))
            zeros = gm.graph.call_function(aten.zeros_like.default, (rest,))
            padded = gm.graph.call_function(aten.cat.default, ([node.args[2], zeros], 3))
        with gm.graph.inserting_after(node):
            result = gm.graph.call_function(aten.slice.Tensor, (node, 3, 0, v))
        node.replace_all_uses_with(result, delete_user_cb=lambda user: user is not result)
        node.args = (*node.args[:2], padded, *node.args[3:])
        for new in (rest, zeros, padded, node, result):
            new.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
            retype(new, mode)
        sites += 1
    return sites


def expected(model: ModelFacts, ctx: PassContext) -> int | None:
    return None
