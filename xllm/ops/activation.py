"""Gated activations."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from xllm.ops.core import define, elementwise_cost, randn


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` (SwiGLU, Shazeer 2020); both ``[..., N]``; silu is rounded first."""
    return torch.nn.functional.silu(gate) * up


def _sample(rng: random.Random, dtype: torch.dtype) -> tuple:
    shape = (1, rng.choice([1, 2, 5, 17]), rng.choice([8, 48, 64]))
    return randn(rng, shape, dtype), randn(rng, shape, dtype)


SILU_MUL = define(
    "silu_mul(Tensor gate, Tensor up) -> Tensor",
    silu_mul, sample=_sample, cost=elementwise_cost(5),
)
