"""Recognise ``xllm.rms_norm``.

    %w = aten.to.dtype(%x, torch.float32); %v = aten.mean(aten.pow(%w, 2), [-1], True)
    %n = aten.mul(%w, aten.rsqrt(aten.add(%v, eps))); %y = aten.mul(%weight, aten.to.dtype(%n, dt))
    ->   %y = xllm.rms_norm(%x, %weight, eps)

In float32 the casts are already gone. Either order of the last product is accepted, and a weight
that is applied in float32, before rounding (OLMo2, Gemma): the op then takes it as float32.

Level: captured -> captured. Numerics: exact (the op's meaning is this formula).
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from xllm.passes.core import ModelFacts, PassContext
from xllm.passes.rewrite import Match, Rewrite, apply

aten = torch.ops.aten
xllm = torch.ops.xllm


def _normalise(wide: Tensor, eps: float) -> Tensor:
    variance = aten.mean.dim(aten.pow.Tensor_Scalar(wide, 2), [-1], True)
    return aten.mul.Tensor(wide, aten.rsqrt.default(aten.add.Tensor(variance, eps)))


def weight_first(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return aten.mul.Tensor(weight, _normalise(x, eps))


def weight_last(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return aten.mul.Tensor(_normalise(x, eps), weight)


def cast_weight_first(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    wide = aten.to.dtype(x, torch.float32)
    return aten.mul.Tensor(weight, aten.to.dtype(_normalise(wide, eps), dtype))


def cast_weight_last(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    wide = aten.to.dtype(x, torch.float32)
    return aten.mul.Tensor(aten.to.dtype(_normalise(wide, eps), dtype), weight)


def wide_weight_first(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    wide = aten.to.dtype(x, torch.float32)
    return aten.to.dtype(aten.mul.Tensor(weight, _normalise(wide, eps)), dtype)


def wide_weight_last(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    wide = aten.to.dtype(x, torch.float32)
    return aten.to.dtype(aten.mul.Tensor(_normalise(wide, eps), weight), dtype)


def fused(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return xllm.rms_norm.default(x, weight, eps)


def fused_cast(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return xllm.rms_norm.default(x, weight, eps)


def fused_wide(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return xllm.rms_norm.default(x, aten.to.dtype(weight, torch.float32), eps)


def _float32(match: Match) -> bool:
    return match.val("x").dtype == torch.float32 and _weight(match)


def _rounds_to_input(match: Match) -> bool:
    return match.binding["dtype"] == match.val("x").dtype and _weight(match)


def _weights_wide(match: Match) -> bool:
    x, weight = match.val("x"), match.val("weight")
    narrow = x.dtype != torch.float32 and match.binding["dtype"] == x.dtype
    return narrow and weight.dtype in (torch.float32, x.dtype) and _fits(match)


def _weight(match: Match) -> bool:
    return match.val("weight").dtype == match.val("x").dtype and _fits(match)


def _fits(match: Match) -> bool:
    x, weight = match.val("x"), match.val("weight")
    return weight.dim() == 1 and weight.shape[0] == x.shape[-1]


RULES = (
    Rewrite(wide_weight_first, fused_wide, _weights_wide),
    Rewrite(wide_weight_last, fused_wide, _weights_wide),
    Rewrite(weight_first, fused, _float32),
    Rewrite(weight_last, fused, _float32),
    Rewrite(cast_weight_first, fused_cast, _rounds_to_input),
    Rewrite(cast_weight_last, fused_cast, _rounds_to_input),
)


def recognise_rms_norm(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Recognise ``xllm.rms_norm``."""
    # wide weights first: the float32 rules match inside them
    return apply(RULES[:2], gm) + apply(RULES[2:], gm)


def expected(model: ModelFacts, ctx: PassContext) -> int | None:
    return len(model.norms)


def modules(model: ModelFacts) -> tuple[str, ...]:
    return model.norms
