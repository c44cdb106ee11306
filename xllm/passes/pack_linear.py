"""Pack linear weights for the target's vector units.

    %y = aten.linear(%x, %w, %b)   ->   %y = xllm.packed_linear(%x, pack(w), %b, rows)

A head that shares its weight with the embedding stays shared: the embedding reads packed rows.

Level: fused -> fused. Numerics: changes rounding (order of a float32 sum).
"""

from __future__ import annotations

import torch
from torch import fx

from xllm.graph import Weight, add_placeholder, calls_of, retype
from xllm.ops.linear import BLOCK
from xllm.passes import keep_quantized
from xllm.passes.core import ModelFacts, PassContext
from xllm.weights import Pack

aten = torch.ops.aten
xllm = torch.ops.xllm


def _packed(gm: fx.GraphModule, weight: fx.Node) -> fx.Node:
    val = weight.meta["val"]
    shape = (-(-val.shape[0] // BLOCK), val.shape[1] // 2, BLOCK, 2)
    with val.fake_mode:
        packed = torch.empty(shape, dtype=val.dtype, device="meta")
    bind = Weight(Pack(weight.meta["bind"].recipe))
    return add_placeholder(gm, weight.name + "_packed", bind, packed)


def _packable(weight: fx.Node, ctx: PassContext) -> bool:
    return (weight.op == "placeholder" and isinstance(weight.meta["bind"], Weight)
            and weight.meta["val"].dtype in ctx.target.packed_dtypes
            and weight.meta["val"].shape[1] % 2 == 0)


def pack_linear(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Pack linear weights for the target's vector units."""
    sites = 0
    for node in calls_of(gm, aten.linear.default, aten.embedding.default):
        linear = node.target is aten.linear.default
        weight = node.args[1] if linear else node.args[0]
        if not _packable(weight, ctx) or not (linear or ctx.facts.tied_embeddings):
            continue
        packed = _packed(gm, weight)
        if linear:
            bias = node.args[2] if len(node.args) > 2 else None
            node.args = (node.args[0], packed, bias, weight.meta["val"].shape[0])
            node.target = xllm.packed_linear.default
            sites += 1
        else:
            node.args, node.kwargs = (packed, node.args[1]), {}
            node.target = xllm.packed_embedding.default
        retype(node, packed.meta["val"].fake_mode)
    return sites


def expected(model: ModelFacts, ctx: PassContext) -> int | None:
    if ctx.dtype not in ctx.target.packed_dtypes:
        return 0
    merged = model.num_grouped_linears - model.num_linear_groups
    kept = keep_quantized.expected(model, ctx)
    return model.num_even_linears - (0 if model.hidden_size % 2 else merged) - kept
