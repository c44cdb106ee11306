"""Linear layers and embeddings over weights packed for vector units.

Packed layout of a weight ``[N, K]`` in bfloat16: ``[N / 32, K / 2, 32, 2]`` with
``packed[n, k, i, j] = weight[32 n + i, 2 k + j]``; N is padded with zero rows to a multiple of 32.
One 64-byte line then holds the pair (2k, 2k+1) of 16 output features, which is what the bf16 dot
product instructions (AVX512-BF16, AMX) take: no shuffles, and a block streams contiguously.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from xllm.ops.core import Cost, define, nbytes, randn

BLOCK = 32


def pack(weight: Tensor) -> Tensor:
    """``[..., N, K]`` → ``[..., ceil(N / 32), K / 2, 32, 2]``; K must be even."""
    rows, columns = weight.shape[-2:]
    padded = torch.nn.functional.pad(weight, (0, 0, 0, -rows % BLOCK))
    blocks = padded.unflatten(-2, (-1, BLOCK)).unflatten(-1, (columns // 2, 2))
    return blocks.transpose(-3, -2).contiguous()


def unpack(packed: Tensor, rows: int) -> Tensor:
    """Inverse of :func:`pack`: ``[..., rows, K]``."""
    return packed.transpose(-3, -2).flatten(-2).flatten(-3, -2)[..., :rows, :]


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    """``x @ unpack(weight).T + bias``: ``[..., K]`` → ``[..., rows]``, accumulated in float32."""
    return torch.nn.functional.linear(x, unpack(weight, rows), bias)


def _fake_linear(x: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


def packed_embedding(weight: Tensor, ids: Tensor) -> Tensor:
    """Rows ``ids`` of the packed weight ``[V / 32, K / 2, 32, 2]``: ``[...]`` → ``[..., K]``."""
    return weight[ids // BLOCK, :, ids % BLOCK].flatten(-2)


def _fake_embedding(weight: Tensor, ids: Tensor) -> Tensor:
    return weight.new_empty((*ids.shape, weight.shape[1] * 2))


def _sample_linear(rng: random.Random, dtype: torch.dtype) -> tuple:
    tokens, width, rows = rng.choice([1, 2, 7, 33]), rng.choice([8, 64]), rng.choice([3, 32, 80])
    bias = randn(rng, (rows,), dtype) if rng.random() < 0.5 else None
    weight = pack(randn(rng, (rows, width), dtype) / width**0.5)
    return randn(rng, (1, tokens, width), dtype), weight, bias, rows


def _sample_embedding(rng: random.Random, dtype: torch.dtype) -> tuple:
    vocab, tokens = rng.choice([3, 40]), rng.choice([1, 9])
    ids = torch.tensor([[rng.randrange(vocab) for _ in range(tokens)]])
    return pack(randn(rng, (vocab, 16), dtype)), ids


def _linear_cost(x: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> Cost:
    tokens = x.numel() // x.shape[-1]
    out_bytes = tokens * rows * x.element_size()
    return Cost(2 * x.numel() * rows, nbytes(x, weight) + out_bytes)


def _embedding_cost(weight: Tensor, ids: Tensor) -> Cost:
    return Cost(0, 2 * ids.numel() * weight.shape[1] * 2 * weight.element_size())


PACKED_LINEAR = define(
    "packed_linear(Tensor x, Tensor weight, Tensor? bias, int rows) -> Tensor",
    packed_linear, fake=_fake_linear, sample=_sample_linear, cost=_linear_cost,
)
PACKED_EMBEDDING = define(
    "packed_embedding(Tensor weight, Tensor ids) -> Tensor",
    packed_embedding, fake=_fake_embedding, sample=_sample_embedding, cost=_embedding_cost,
)
