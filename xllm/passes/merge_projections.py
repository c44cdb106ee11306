"""Merge linear layers that read the same input: q/k/v, and gate/up.

    %q = aten.linear(%x, %wq); %k = aten.linear(%x, %wk); %v = aten.linear(%x, %wv)
    ->   %m = aten.linear(%x, concat(wq, wk, wv)); q, k, v = slices of %m

One pass over the input and one kernel instead of three. The weight becomes a recipe (concat),
executed while streaming the checkpoint: nothing is held twice.

Level: paged -> paged. Numerics: same rounding (each output feature is the same dot product).
"""

from __future__ import annotations

import torch
from torch import fx

from xllm.graph import Weight, add_placeholder, calls_of, retype
from xllm.passes.core import ModelFacts, PassContext
from xllm.weights import Concat

aten = torch.ops.aten


def _is_weight(node: object) -> bool:
    return (isinstance(node, fx.Node) and node.op == "placeholder"
            and isinstance(node.meta["bind"], Weight) and len(node.users) == 1)


def siblings(gm: fx.GraphModule) -> list[list[fx.Node]]:
    """Groups of two or more linears over one input, each with a parameter of its own."""
    groups: dict[tuple, list[fx.Node]] = {}
    for node in calls_of(gm, aten.linear.default):
        x, weight, *bias = node.args
        if _is_weight(weight) and all(_is_weight(b) for b in bias):
            groups.setdefault((x, len(bias), weight.meta["val"].dtype), []).append(node)
    return [group for group in groups.values() if len(group) > 1]


def _concatenated(gm: fx.GraphModule, parts: list[fx.Node]) -> fx.Node:
    recipe = Concat(tuple(part.meta["bind"].recipe for part in parts))
    with parts[0].meta["val"].fake_mode:
        val = torch.cat([part.meta["val"] for part in parts])
    return add_placeholder(gm, "_and_".join(part.name for part in parts), Weight(recipe), val)


def _merge(gm: fx.GraphModule, group: list[fx.Node]) -> None:
    parameters = [_concatenated(gm, list(parts))
                  for parts in zip(*(node.args[1:] for node in group), strict=True)]
    mode = group[0].meta["val"].fake_mode
    begin, new = 0, []
    with gm.graph.inserting_before(group[0]):
        merged = gm.graph.call_function(aten.linear.default, (group[0].args[0], *parameters))
        for node in group:
            end = begin + node.meta["val"].shape[-1]
            part = gm.graph.call_function(
                aten.slice.Tensor, (merged, node.meta["val"].dim() - 1, begin, end))
            node.replace_all_uses_with(part)
            new.append(part)
            begin = end
    for node, source in zip([merged, *new], [group[0], *group], strict=True):
        node.meta["nn_module_stack"] = source.meta.get("nn_module_stack", {})
        retype(node, mode)
    for node in group:
        gm.graph.erase_node(node)


def merge_projections(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Merge linear layers that read the same input: q/k/v, and gate/up."""
    groups = siblings(gm)
    for group in groups:
        _merge(gm, group)
    return len(groups)


def expected(model: ModelFacts, ctx: PassContext) -> int | None:
    return model.num_linear_groups
