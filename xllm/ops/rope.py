"""Rotary position embedding, "rotate half" layout (Su et al. 2021 as in GPT-NeoX and Llama)."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from xllm.ops.core import define, elementwise_cost, randn


def rotate_half(x: Tensor) -> Tensor:
    """``(-x[D/2:], x[:D/2])`` over the last dimension."""
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x * cos + rotate_half(x) * sin``; ``x [..., T, H, D]``, ``cos, sin [..., T, D]``."""
    return x * cos.unsqueeze(-2) + rotate_half(x) * sin.unsqueeze(-2)


def _sample(rng: random.Random, dtype: torch.dtype) -> tuple:
    tokens, heads, dim = rng.choice([1, 2, 7]), rng.choice([1, 4]), rng.choice([8, 16])
    angle = randn(rng, (1, tokens, dim), torch.float32)
    return randn(rng, (1, tokens, heads, dim), dtype), angle.cos().to(dtype), angle.sin().to(dtype)


ROPE = define(
    "rope(Tensor x, Tensor cos, Tensor sin) -> Tensor",
    rope, sample=_sample, cost=elementwise_cost(4),
)
