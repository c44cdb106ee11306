"""Compute logits only for the rows that somebody asked for.

    return aten.linear(%hidden, %head)
    ->   %rows = aten.index_select(aten.squeeze(%hidden, 0), 0, %logits_rows)
         return aten.to.dtype(aten.linear(%rows, %head), torch.float32)

Prefill needs the last row of a prompt, not all of them; the head is the largest matrix. Logits
``[R, V]`` leave the graph in float32, as samplers want them.

Level: captured -> canonical. Numerics: exact.
"""

from __future__ import annotations

import torch
from torch import fx

from xllm.graph import Input, add_placeholder, retype
from xllm.passes.core import ModelFacts, PassContext

aten = torch.ops.aten


def select_logits_rows(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Compute logits only for the rows that somebody asked for."""
    (output,) = gm.graph.find_nodes(op="output")
    head = output.args[0][0]
    is_head = isinstance(head, fx.Node) and head.target is aten.linear.default
    if not is_head or set(head.users) != {output}:
        return 0
    mode = head.meta["val"].fake_mode
    with mode:
        val = torch.empty_like(ctx.inputs["logits_rows"])
    rows = add_placeholder(gm, "logits_rows", Input("logits_rows"), val)
    with gm.graph.inserting_before(head):
        flat = gm.graph.call_function(aten.squeeze.dim, (head.args[0], 0))
        chosen = gm.graph.call_function(aten.index_select.default, (flat, 0, rows))
    head.args = (chosen, *head.args[1:])
    with gm.graph.inserting_after(head):
        wide = gm.graph.call_function(aten.to.dtype, (head, torch.float32))
    for node in (flat, chosen, head, wide):
        node.meta["nn_module_stack"] = head.meta.get("nn_module_stack", {})
        retype(node, mode)
    output.args = ((wide,),)
    return 1


def expected(model: ModelFacts, ctx: PassContext) -> int | None:
    return 1
