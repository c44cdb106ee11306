"""Attention of a vision tower: packed images, each patch against all patches of its segment.

Shape legend: N patches of all images, H heads, D head size, B segments (images, or windows).
"""

from __future__ import annotations

import random
from itertools import pairwise

import torch
from torch import Tensor

from xllm.ops.core import Cost, define, nbytes, randn


def segment_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor,
                      scale: float) -> Tensor:
    """Attention without a mask within each segment: ``q, k, v [N, H, D]`` → ``[N, H, D]``.

    ``cu_seqlens [B + 1]`` int32: segment b is the rows from ``cu_seqlens[b]`` to
    ``cu_seqlens[b + 1]``; rows outside every segment come back as zeros. Softmax and accumulation
    in float32. Source: Vaswani et al. 2017; packing as in Dehghani et al. 2023 (NaViT).
    """
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    wide = torch.promote_types(q.dtype, torch.float32)
    for begin, end in pairwise(cu_seqlens.tolist()):
        rows = slice(begin, end)
        scores = torch.einsum("nhd,mhd->hnm", q[rows].to(wide), k[rows].to(wide)) * scale
        out[rows] = torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v[rows].to(wide)).to(q.dtype)
    return out


def _fake(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _sample(rng: random.Random, dtype: torch.dtype) -> tuple:
    heads, dim = rng.choice([(1, 8), (2, 20), (4, 80)])
    lengths = [rng.choice([1, 4, 4, 16, 64, 70]) for _ in range(rng.randint(1, 5))]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    q, k, v = (randn(rng, (sum(lengths), heads, dim), dtype) for _ in range(3))
    return q, k, v, bounds, dim**-0.5


def _cost(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Cost:
    pairs = int((cu_seqlens.diff().long() ** 2).sum())
    return Cost(4 * pairs * q.shape[1] * q.shape[2], nbytes(q, q, k, v))


SEGMENT_ATTENTION = define(
    "segment_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, float scale) -> Tensor",
    segment_attention, fake=_fake, sample=_sample, cost=_cost,
)
