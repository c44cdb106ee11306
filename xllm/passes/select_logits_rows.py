"""Compute logits only for the rows that somebody asked for, and give out their hidden states.

    return aten.linear(%hidden, %head)
    ->   %rows = aten.index_select(aten.squeeze(%hidden, 0), 0, %logits_rows)
         return aten.to.dtype(aten.linear(%rows, %head), torch.float32),
                aten.to.dtype(%rows, torch.float32)

Prefill needs the last row of a prompt, not all of them; the head is the largest matrix. What
follows the head element by element (a scale, a soft cap) stays behind it. ``logits`` ``[R, V]``
and ``hidden`` ``[R, H]``, the rows after the final norm, leave the program in float32, as samplers
and embeddings want them.

Level: captured -> canonical. Numerics: exact.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from xllm.graph import Input, Program, add_placeholder, retype
from xllm.passes.core import ModelFacts, PassContext

aten = torch.ops.aten
ELEMENTWISE = frozenset(
    {aten.mul.Tensor, aten.div.Tensor, aten.tanh.default, aten.to.dtype})


def _behind_head(output: fx.Node) -> list[fx.Node]:
    """The head and the elementwise calls from it to the output, in order; empty if none."""
    chain, node, user = [], output.args[0][0], output
    while isinstance(node, fx.Node) and set(node.users) == {user}:
        chain.insert(0, node)
        if node.target is aten.linear.default:
            return chain
        if node.target not in ELEMENTWISE or len(node.all_input_nodes) != 1:
            break
        node, user = node.all_input_nodes[0], node
    return []


def select_logits_rows(program: Program, ctx: PassContext) -> int:
    """Compute logits only for the rows that somebody asked for, and give out their states."""
    (gm,), (call,) = program.pieces.values(), program.schedule
    (output,) = gm.graph.find_nodes(op="output")
    chain = _behind_head(output)
    if not chain:
        return 0
    head, last = chain[0], chain[-1]
    mode = head.meta["val"].fake_mode
    with mode:
        val = torch.empty_like(ctx.inputs["logits_rows"])
    rows = add_placeholder(gm, "logits_rows", Input("logits_rows"), val)
    with gm.graph.inserting_before(head):
        flat = gm.graph.call_function(aten.squeeze.dim, (head.args[0], 0))
        chosen = gm.graph.call_function(aten.index_select.default, (flat, 0, rows))
    head.args = (chosen, *head.args[1:])
    with gm.graph.inserting_before(output):
        wide = gm.graph.call_function(aten.to.dtype, (last, torch.float32))
        hidden = gm.graph.call_function(aten.to.dtype, (chosen, torch.float32))
    for node in (flat, chosen, wide, hidden):
        node.meta["nn_module_stack"] = head.meta.get("nn_module_stack", {})
    for node in (flat, chosen, *chain, wide, hidden):
        retype(node, mode)
    output.args = ((wide, hidden),)
    program.schedule = [replace(call, outputs=("logits", "hidden"))]
    return 1


def expected(model: ModelFacts, ctx: PassContext) -> int | None:
    return 1
