"""PageAttention: keys and values go to a paged cache, attention reads them from there.

    %o = xllm.attention(%q, %k, %v, scale, window)
    ->   xllm.kv_write(k[0], v[0], %kv_cache, %slot_mapping)
         %o = xllm.paged_attention(q[0], %kv_cache, %block_table, %query_start_loc, %seq_lens, ...)

The block table, slot mapping and lengths become graph inputs; the cache, one per layer, becomes a
state of the piece. Source: Kwon et al. 2023.

Level: canonical -> paged. Numerics: same rounding (one sequence); ragged batches become possible.
"""

from __future__ import annotations

import torch
from torch import fx

from xllm.graph import Input, State, add_placeholder, calls_of, retype
from xllm.passes.core import ModelFacts, PassContext
from xllm.passes.rewrite import full_args

aten = torch.ops.aten
xllm = torch.ops.xllm
INPUTS = ("block_table", "query_start_loc", "seq_lens")


def _cache(gm: fx.GraphModule, key: fx.Node, ctx: PassContext) -> fx.Node:
    """The piece's KV cache placeholder for a layer with keys ``[B, T, G, D]``."""
    groups, dim = key.meta["val"].shape[2:]
    shape = (ctx.inputs["pages"].shape[0], 2, groups, ctx.page_size, dim)
    with key.meta["val"].fake_mode:
        val = torch.empty(shape, dtype=key.meta["val"].dtype, device="meta")
    return add_placeholder(gm, "kv_cache", State("kv_cache"), val)


def page_attention(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Keys and values go to a paged cache, attention reads them from there."""
    sites = 0
    for node in calls_of(gm, xllm.attention.default):
        q, k, v, *options = full_args(node)
        cache = _cache(gm, k, ctx)
        slots, *meta = (add_placeholder(gm, name, Input(name), ctx.inputs[name])
                        for name in ("slot_mapping", *INPUTS))
        with gm.graph.inserting_before(node):
            flat = [gm.graph.call_function(aten.squeeze.dim, (x, 0)) for x in (q, k, v)]
            write = gm.graph.call_function(xllm.kv_write.default, (*flat[1:], cache, slots))
            paged = gm.graph.call_function(
                xllm.paged_attention.default, (flat[0], cache, *meta, *options))
            out = gm.graph.call_function(aten.unsqueeze.default, (paged, 0))
        for new in (*flat, write, paged, out):
            new.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
            retype(new, q.meta["val"].fake_mode)
        node.replace_all_uses_with(out)
        gm.graph.erase_node(node)
        sites += 1
    return sites


def expected(model: ModelFacts, ctx: PassContext) -> int | None:
    return model.num_layers
