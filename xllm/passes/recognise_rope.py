"""Recognise ``xllm.rope``, rotary embedding on ``[B, H, T, D]``.

    %h = aten.cat([aten.neg(aten.slice(%x, 3, D/2, end)), aten.slice(%x, 3, 0, D/2)], -1)
    %y = aten.add(aten.mul(%x, %cos), aten.mul(%h, %sin))
    ->   %y = aten.transpose(xllm.rope(aten.transpose(%x, 1, 2), cos, sin), 1, 2)

The op takes heads behind tokens, as the projections leave them; the transposes cancel against
those around attention.

Level: captured -> captured. Numerics: exact (the op's meaning is this formula).
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from xllm.passes.core import ModelFacts, PassContext
from xllm.passes.rewrite import Match, Rewrite, apply

aten = torch.ops.aten
xllm = torch.ops.xllm
END = 2**63 - 1


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor, half: int) -> Tensor:
    first, second = aten.slice.Tensor(x, 3, 0, half), aten.slice.Tensor(x, 3, half, END)
    rotated = aten.cat.default([aten.neg.default(second), first], -1)
    return aten.add.Tensor(aten.mul.Tensor(x, cos), aten.mul.Tensor(rotated, sin))


def rope(x: Tensor, cos: Tensor, sin: Tensor, half: int) -> Tensor:
    tables = aten.squeeze.dim(cos, 1), aten.squeeze.dim(sin, 1)
    return aten.transpose.int(xllm.rope.default(aten.transpose.int(x, 1, 2), *tables), 1, 2)


def _halves(match: Match) -> bool:
    x, cos = match.val("x"), match.val("cos")
    one_head = cos.dim() == 4 and cos.shape[1] == 1 and match.val("sin").shape[1] == 1
    return one_head and x.dim() == 4 and x.shape[-1] == 2 * match.binding["half"] == cos.shape[-1]


RULES = (Rewrite(rotate_half, rope, _halves),)


def recognise_rope(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Recognise ``xllm.rope``, rotary embedding on ``[B, H, T, D]``."""
    return apply(RULES, gm)


def expected(model: ModelFacts, ctx: PassContext) -> int | None:
    return model.num_rotations
