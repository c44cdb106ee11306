"""PageAttention: keys and values go to a paged cache, attention reads them from there.

    %o = xllm.attention(%q, %k, %v, scale, window)
    ->   xllm.kv_write(k[0], v[0], %kv_cache, %slot_mapping)
         %o = xllm.paged_attention(q[0], %kv_cache, %block_table, %query_start_loc, %seq_lens, ...)

    %o = xllm.latent_attention(%q_nope, %q_rope, %latent, %k_rope, %weight, scale)
    ->   xllm.latent_write(latent[0], k_rope[0], %kv_cache, %slot_mapping)
         %o = xllm.paged_latent_attention(q_nope[0], q_rope[0], %kv_cache, ..., %w_uk, %w_uv, scale)

The block table, slot mapping and lengths become graph inputs; the cache, one per layer, becomes a
state of the piece. The weight of latent attention becomes the two matrices of the absorbed form, by
recipe. Source: Kwon et al. 2023.

Level: canonical -> paged. Numerics: changes rounding (of latent attention, whose keys and values
are not rounded any more; else the same for one sequence). Ragged batches become possible.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from xllm.graph import Input, State, Weight, add_placeholder, calls_of, retype
from xllm.passes.core import ModelFacts, PassContext
from xllm.passes.rewrite import full_args
from xllm.weights import Recipe, Reshape, Slice, Transpose

aten = torch.ops.aten
xllm = torch.ops.xllm
INPUTS = ("block_table", "query_start_loc", "seq_lens")


def _cache(gm: fx.GraphModule, like: Tensor, shape: tuple[int, ...], ctx: PassContext) -> fx.Node:
    """The piece's KV cache placeholder: ``shape`` is that of a page."""
    with like.fake_mode:
        val = torch.empty((ctx.inputs["pages"].shape[0], *shape), dtype=like.dtype, device="meta")
    return add_placeholder(gm, "kv_cache", State("kv_cache"), val)


def _matrix(gm: fx.GraphModule, name: str, weight: fx.Node, recipe: Recipe,
            shape: tuple[int, ...]) -> fx.Node:
    with weight.meta["val"].fake_mode:
        val = torch.empty(shape, dtype=weight.meta["val"].dtype, device="meta")
    return add_placeholder(gm, f"{weight.name}_{name}", Weight(recipe), val)


def _matrices(gm: fx.GraphModule, weight: fx.Node, heads: int,
              nope: int) -> tuple[fx.Node, fx.Node]:
    """``w_uk [H, N, R]`` and ``w_uv [H, R, V]`` of a weight ``[H (N + V), R]``."""
    rows, rank = weight.meta["val"].shape
    both = rows // heads
    whole = Reshape(weight.meta["bind"].recipe, (heads, both, rank))
    keys, values = Slice(whole, 1, 0, nope), Transpose(Slice(whole, 1, nope, both), 1, 2)
    return (_matrix(gm, "uk", weight, keys, (heads, nope, rank)),
            _matrix(gm, "uv", weight, values, (heads, rank, both - nope)))


def _page(gm: fx.GraphModule, node: fx.Node, ctx: PassContext) -> tuple[fx.Node, ...]:
    """The paged form of an ``attention`` node: everything new, the result last."""
    q, k, v, *options = full_args(node)
    groups, dim = k.meta["val"].shape[2:]
    cache = _cache(gm, k.meta["val"], (2, groups, ctx.page_size, dim), ctx)
    return _calls(gm, node, ctx, (xllm.kv_write.default, xllm.paged_attention.default),
                  ((k, v), (q,)), cache, options)


def _page_latent(gm: fx.GraphModule, node: fx.Node, ctx: PassContext) -> tuple[fx.Node, ...]:
    """The paged form of a ``latent_attention`` node."""
    q_nope, q_rope, latent, k_rope, weight, scale = full_args(node)
    width = sum(x.meta["val"].shape[2] for x in (latent, k_rope))
    cache = _cache(gm, latent.meta["val"], (ctx.page_size, width), ctx)
    matrices = _matrices(gm, weight, *q_nope.meta["val"].shape[2:])
    return _calls(gm, node, ctx, (xllm.latent_write.default, xllm.paged_latent_attention.default),
                  ((latent, k_rope), (q_nope, q_rope)), cache, [*matrices, scale])


def _calls(gm: fx.GraphModule, node: fx.Node, ctx: PassContext, ops: tuple,
           operands: tuple[tuple[fx.Node, ...], tuple[fx.Node, ...]], cache: fx.Node,
           options: list[object]) -> tuple[fx.Node, ...]:
    """Write the first operands, attend with the second, both without the batch dimension."""
    slots, *batch = (add_placeholder(gm, name, Input(name), ctx.inputs[name])
                     for name in ("slot_mapping", *INPUTS))
    call = gm.graph.call_function
    with gm.graph.inserting_before(node):
        stored, queries = ([call(aten.squeeze.dim, (x, 0)) for x in xs] for xs in operands)
        write = call(ops[0], (*stored, cache, slots))
        paged = call(ops[1], (*queries, cache, *batch, *options))
        return (*stored, *queries, write, paged, call(aten.unsqueeze.default, (paged, 0)))


FORMS = {xllm.attention.default: _page, xllm.latent_attention.default: _page_latent}


def page_attention(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Keys and values go to a paged cache, attention reads them from there."""
    nodes = list(calls_of(gm, *FORMS))
    for node in nodes:
        new = FORMS[node.target](gm, node, ctx)
        for call in new:
            call.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
            retype(call, node.meta["val"].fake_mode)
        node.replace_all_uses_with(new[-1])
        gm.graph.erase_node(node)
    return len(nodes)


def expected(model: ModelFacts, ctx: PassContext) -> int | None:
    return model.num_layers
