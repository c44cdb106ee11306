"""Norm heads where the projection left them, then transpose.

    %t = aten.transpose(%x, 1, 2); %y = xllm.rms_norm(%t, %weight, eps)
    ->   %n = xllm.rms_norm(%x, %weight, eps); %y = aten.transpose(%n, 1, 2)

The transposes before attention then lie together and cancel.

Level: captured -> captured. Numerics: exact.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from xllm.passes.core import ModelFacts, PassContext
from xllm.passes.rewrite import Match, Rewrite, apply

aten = torch.ops.aten
xllm = torch.ops.xllm


def transposed_first(x: Tensor, weight: Tensor, eps: float, first: int, second: int) -> Tensor:
    return xllm.rms_norm.default(aten.transpose.int(x, first, second), weight, eps)


def normed_first(x: Tensor, weight: Tensor, eps: float, first: int, second: int) -> Tensor:
    return aten.transpose.int(xllm.rms_norm.default(x, weight, eps), first, second)


def _last_stays(match: Match) -> bool:
    last = match.val("x").dim() - 1
    return not {match.binding["first"], match.binding["second"]} & {last, -1}


RULES = (Rewrite(transposed_first, normed_first, _last_stays),)


def norm_before_transpose(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Norm heads where the projection left them, then transpose."""
    return apply(RULES, gm)


def expected(model: ModelFacts, ctx: PassContext) -> int | None:
    return None
