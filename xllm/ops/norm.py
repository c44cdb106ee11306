"""Root-mean-square layer norms."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from xllm.ops.core import define, elementwise_cost, randn


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last dimension; statistics in float32.

    ``x [..., N]``, ``weight [N]`` → ``[..., N]`` in x's dtype. The normalised value is rounded to
    x's dtype before the weight is applied (Llama, Qwen); a float32 weight over narrower x is
    applied first, and the product rounded (OLMo2; Gemma, with a weight of 1 + w). Source: Zhang &
    Sennrich 2019.
    """
    wide = x.to(torch.float32)
    normalised = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight.dtype == x.dtype:
        return weight * normalised.to(x.dtype)
    return (weight * normalised).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``(rms_norm(residual + x), residual + x)``; the sum is rounded to x's dtype first."""
    total = residual + x
    return rms_norm(total, weight, eps), total


def _sample_norm(rng: random.Random, dtype: torch.dtype) -> tuple:
    tokens, width = rng.choice([1, 2, 5, 17]), rng.choice([8, 64, 96])
    weight = randn(rng, (width,), rng.choice([dtype, dtype, torch.float32]))
    return randn(rng, (1, tokens, width), dtype), weight, 1e-6


def _sample_add_norm(rng: random.Random, dtype: torch.dtype) -> tuple:
    x, weight, eps = _sample_norm(rng, dtype)
    return x, randn(rng, tuple(x.shape), dtype), weight, eps


RMS_NORM = define(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    rms_norm, sample=_sample_norm, cost=elementwise_cost(4),
)
ADD_RMS_NORM = define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    add_rms_norm, sample=_sample_add_norm, cost=elementwise_cost(5),
)
