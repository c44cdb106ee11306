"""Fuse the residual add into the norm that follows it.

    %t = aten.add(%residual, %x); %y = xllm.rms_norm(%t, %weight, eps)
    ->   %y, %t = xllm.add_rms_norm(%x, %residual, %weight, eps)

The sum has a second user, the next residual add: it is an output of the pattern.

Level: paged -> fused. Numerics: exact (the op's meaning is this formula).
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from xllm.passes.core import ModelFacts, PassContext
from xllm.passes.rewrite import Match, Rewrite, apply
from xllm.torch_private import same_type

aten = torch.ops.aten
xllm = torch.ops.xllm


def separate(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = aten.add.Tensor(residual, x)
    return xllm.rms_norm.default(total, weight, eps), total


def fused(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    both = xllm.add_rms_norm.default(x, residual, weight, eps)
    return operator.getitem(both, 0), operator.getitem(both, 1)


def _same_shape(match: Match) -> bool:
    x, residual = match.binding["x"], match.binding["residual"]
    return isinstance(x, fx.Node) and same_type(x.meta["val"], residual.meta["val"])


RULES = (Rewrite(separate, fused, _same_shape),)


def fuse_add_rms_norm(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Fuse the residual add into the norm that follows it."""
    return apply(RULES, gm)


def expected(model: ModelFacts, ctx: PassContext) -> int | None:
    return model.num_residual_norms
