"""Recognise ``xllm.silu_mul``, the gated activation.

    %s = aten.silu(%gate); %m = aten.mul(%s, %up)   ->   %m = xllm.silu_mul(%gate, %up)

Level: captured -> captured. Numerics: exact (the op's meaning is this formula).
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from xllm.passes.core import ModelFacts, PassContext
from xllm.passes.rewrite import Match, Rewrite, apply
from xllm.torch_private import same_type

aten = torch.ops.aten
xllm = torch.ops.xllm


def gate_first(gate: Tensor, up: Tensor) -> Tensor:
    return aten.mul.Tensor(aten.silu.default(gate), up)


def up_first(gate: Tensor, up: Tensor) -> Tensor:
    return aten.mul.Tensor(up, aten.silu.default(gate))


def fused(gate: Tensor, up: Tensor) -> Tensor:
    return xllm.silu_mul.default(gate, up)


def _same_shape(match: Match) -> bool:
    return same_type(match.val("gate"), match.val("up"))


RULES = (Rewrite(gate_first, fused, _same_shape), Rewrite(up_first, fused, _same_shape))


def recognise_silu_mul(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Recognise ``xllm.silu_mul``, the gated activation."""
    return apply(RULES, gm)


def expected(model: ModelFacts, ctx: PassContext) -> int | None:
    return model.num_gated_mlps
