"""Pack the experts' weights for the target's vector units.

    %y = xllm.group_matmul(%x, %w, %b, %offsets, %rows)
    ->   %y = xllm.packed_group_matmul(%x, pack(w), %b, %offsets, %rows, outputs)

Level: fused -> fused. Numerics: changes rounding (order of a float32 sum).
"""

from __future__ import annotations

import torch
from torch import fx

from xllm.graph import Weight, add_placeholder, calls_of, retype
from xllm.ops.linear import BLOCK
from xllm.passes.core import ModelFacts, PassContext
from xllm.weights import Pack

xllm = torch.ops.xllm


def _packable(weight: fx.Node, ctx: PassContext) -> bool:
    return (weight.op == "placeholder" and isinstance(weight.meta["bind"], Weight)
            and weight.meta["val"].dtype in ctx.target.packed_dtypes
            and weight.meta["val"].shape[2] % 2 == 0)


def _packed(gm: fx.GraphModule, weight: fx.Node) -> fx.Node:
    val = weight.meta["val"]
    experts, outputs, width = val.shape
    with val.fake_mode:
        packed = torch.empty((experts, -(-outputs // BLOCK), width // 2, BLOCK, 2),
                             dtype=val.dtype, device="meta")
    bind = Weight(Pack(weight.meta["bind"].recipe))
    return add_placeholder(gm, weight.name + "_packed", bind, packed)


def pack_experts(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Pack the experts' weights for the target's vector units."""
    sites = 0
    for node in calls_of(gm, xllm.group_matmul.default):
        x, weight, *rest = node.args
        if _packable(weight, ctx):
            node.args = (x, _packed(gm, weight), *rest, weight.meta["val"].shape[1])
            node.target = xllm.packed_group_matmul.default
            retype(node, weight.meta["val"].fake_mode)
            sites += 1
    return sites


def expected(model: ModelFacts, ctx: PassContext) -> int | None:
    return model.num_even_expert_weights if ctx.dtype in ctx.target.packed_dtypes else 0
