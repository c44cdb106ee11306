"""Group tokens by expert: one matrix product per expert, in place of a loop over experts.

    %o = xllm.experts(%x, %ids, %weights, %gate_up, %down, ...)
    ->   %rows, %places, %offsets = xllm.group_tokens(%ids, E)
         %both = xllm.group_matmul(%x, %gate_up, bias, %offsets, %rows)
         %hidden = xllm.gated_activation(%both, activation, limit)
         %y = xllm.group_matmul(%hidden, %down, bias, %offsets)
         %o = xllm.combine_experts(%y, %places, %weights)

All shapes are static in tokens and picks. Transposed and interleaved weights become one layout by
recipe. Tokens per expert leave the graph as ``expert_load.<i>``, i counting the layers that have
experts. A shared expert stays the dense layer that it is: merged projections and packed weights
serve it already, and as one more group it would read the same bytes.

Level: paged -> paged. Numerics: same rounding (order of a float32 sum over picks).
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import fx

from xllm.graph import Program, Weight, add_placeholder, calls_of, retype
from xllm.passes.core import ModelFacts, PassContext
from xllm.passes.rewrite import full_args
from xllm.weights import Concat, Slice, Transpose

aten = torch.ops.aten
xllm = torch.ops.xllm


def _is_parameter(node: fx.Node) -> bool:
    return node.op == "placeholder" and isinstance(node.meta["bind"], Weight)


def _one_layout(gm: fx.GraphModule, node: fx.Node | None, transposed: bool, interleaved: bool
                ) -> fx.Node | None:
    """The parameter with outputs in dimension 1, those of the gate before those of up."""
    if node is None or not (transposed or interleaved):
        return node
    recipe, val = node.meta["bind"].recipe, node.meta["val"]
    shape = list(val.shape)
    if transposed:
        recipe, shape[1:] = Transpose(recipe, 1, 2), shape[:0:-1]
    if interleaved:
        halves = (Slice(recipe, 1, start, shape[1], 2) for start in (0, 1))
        recipe = Concat(tuple(halves), 1)
    with val.fake_mode:
        made = torch.empty(shape, dtype=val.dtype, device="meta")
    return add_placeholder(gm, node.name + "_by_output", Weight(recipe), made)


def _call(gm: fx.GraphModule, like: fx.Node) -> Callable[..., fx.Node]:
    """``call(target, *args)`` adds a typed node before ``like``, from the same module."""

    def call(target: object, *args: object) -> fx.Node:
        with gm.graph.inserting_before(like):
            node = gm.graph.call_function(target, args)
        node.meta["nn_module_stack"] = like.meta.get("nn_module_stack", {})
        retype(node, like.meta["val"].fake_mode)
        return node

    return call


def _group(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Replace one ``xllm.experts`` node; returns the node of the tokens per expert, ``[E]``."""
    (x, ids, weights, gate_up, down, gate_up_bias, down_bias, activation, limit, interleaved,
     transposed) = full_args(node)
    gate_up = _one_layout(gm, gate_up, transposed, interleaved)
    gate_up_bias = _one_layout(gm, gate_up_bias, False, interleaved)
    down = _one_layout(gm, down, transposed, False)
    call = _call(gm, node)
    experts = down.meta["val"].shape[0]
    groups = call(xllm.group_tokens.default, ids, experts)
    rows, places, offsets = (call(operator.getitem, groups, i) for i in range(3))
    both = call(xllm.group_matmul.default, x, gate_up, gate_up_bias, offsets, rows)
    hidden = call(xllm.gated_activation.default, both, activation, limit)
    y = call(xllm.group_matmul.default, hidden, down, down_bias, offsets, None)
    node.replace_all_uses_with(call(xllm.combine_experts.default, y, places, weights))
    begin = call(aten.slice.Tensor, offsets, 0, 0, experts)
    end = call(aten.slice.Tensor, offsets, 0, 1, experts + 1)
    load = call(aten.sub.Tensor, end, begin)
    gm.graph.erase_node(node)
    return load


def _groupable(node: fx.Node) -> bool:
    """A layout can only be changed where the weights are parameters."""
    *_, gate_up, down, gate_up_bias, down_bias, _, _, interleaved, transposed = full_args(node)
    changed = [gate_up, gate_up_bias] * interleaved + [gate_up, down] * transposed
    return all(_is_parameter(n) for n in changed if n is not None)


def group_experts(program: Program, ctx: PassContext) -> int:
    """Group tokens by expert: one matrix product per expert."""
    loads = {}
    for piece, gm in program.pieces.items():
        found = filter(_groupable, calls_of(gm, xllm.experts.default))
        loads[piece] = [_group(gm, node) for node in found]
        (output,) = gm.graph.find_nodes(op="output")
        output.args = ((*output.args[0], *loads[piece]),)
    layers = itertools.count()
    program.schedule = [
        replace(call, outputs=(*call.outputs, *(f"expert_load.{next(layers)}"
                                                for _ in loads[call.piece])))
        for call in program.schedule]
    return next(layers)


def expected(model: ModelFacts, ctx: PassContext) -> int | None:
    return model.num_moe_layers
