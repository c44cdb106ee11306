"""Kernels for experts: groups of every size, several chunks, refused arguments."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.test_cpu import check, randn
from xllm.ops.group_matmul import group_tokens
from xllm.ops.linear import pack

Kernels = Callable[..., object]
BY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
EXPERTS = 128


def offsets_of(counts: list[int]) -> Tensor:
    """Offsets of groups of these sizes."""
    return torch.tensor([0, *counts]).cumsum(0).int()


def products(kernels: Kernels, counts: list[int], width: int, outputs: int, dtype: torch.dtype,
             rows: Tensor | None = None) -> None:
    """Both products over groups of these sizes, with and without a bias."""
    weight = randn(len(counts), outputs, width, dtype=dtype, seed=1) / width**0.5
    bias = randn(len(counts), outputs, dtype=dtype, seed=2)
    x = randn(sum(counts) if rows is None else 7, width, dtype=dtype)
    offsets = offsets_of(counts)
    for added in (None, bias):
        check(kernels, "group_matmul", x, weight, added, offsets, rows)
        check(kernels, "packed_group_matmul", x, pack(weight), added, offsets, rows, outputs)


@BY_DTYPE
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 11, 12, 13, 47, 48, 49, 121, 300])
def test_group_sizes(kernels: Kernels, count: int, dtype: torch.dtype) -> None:
    """One expert takes all, between two that take none."""
    products(kernels, [0, count, 0], 64, 70, dtype)


@BY_DTYPE
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_many_experts(kernels: Kernels, dtype: torch.dtype, seed: int) -> None:
    """128 experts; a few of them, or most, have rows, gathered from seven."""
    rng = random.Random(seed)
    share = rng.choice([0.02, 0.5, 0.9])
    counts = [rng.choice([1, 2, 30]) if rng.random() < share else 0 for _ in range(EXPERTS)]
    rows = torch.tensor([rng.randrange(7) for _ in range(sum(counts))], dtype=torch.int32)
    products(kernels, counts, 16, 40, dtype, rows)


def test_several_chunks(kernels: Kernels) -> None:
    """A group whose rows are larger than the second-level cache's share."""
    products(kernels, [3, 300, 1], 3072, 33, torch.bfloat16)


@BY_DTYPE
@pytest.mark.parametrize("tokens", [0, 1, 2000])
def test_tokens(kernels: Kernels, tokens: int, dtype: torch.dtype) -> None:
    """No token, one, and many: sorted, and combined again with weights of both types."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(tokens, EXPERTS, generator=generator).argsort(1)[:, :8]
    check(kernels, "group_tokens", ids, EXPERTS)
    check(kernels, "group_tokens", torch.full((tokens, 1), 5), EXPERTS)
    places = group_tokens(ids, EXPERTS)[1]
    y = randn(tokens * 8, 100, dtype=dtype)
    for weights in (randn(tokens, 8), randn(tokens, 8, dtype=dtype)):
        check(kernels, "combine_experts", y, places, weights / 8)


def test_rows_without_a_group_are_zero(kernels: Kernels) -> None:
    x, weight, offsets = torch.ones(5, 8), torch.ones(2, 3, 8), offsets_of([1, 2])
    for name, stored, *more in (("group_matmul", weight), ("packed_group_matmul", pack(weight), 3)):
        out = kernels(name, x, stored, None, offsets, None, *more)
        assert out[:3].eq(8).all() and out[3:].eq(0).all()


@pytest.mark.parametrize(("name", "args", "message"), [
    ("group_tokens", (torch.tensor([[0, 4]]), 4), "expert_ids contains 4; expected 0 to 3"),
    ("group_tokens", (torch.tensor([0, 1]), 4), "expert_ids is Long"),
    ("group_matmul", (torch.ones(2, 8), torch.ones(2, 3, 6), None, offsets_of([1, 1]), None),
     "group_matmul: weight is"),
    ("group_matmul", (torch.ones(2, 8), torch.ones(2, 3, 8), None, offsets_of([1, 2]), None),
     "offsets goes from 1 to 3; expected ascending, at most 2"),
    ("packed_group_matmul",
     (torch.ones(2, 8), torch.ones(1, 1, 4, 32, 2), None, offsets_of([2]),
      torch.tensor([0, 2], dtype=torch.int32), 3), "rows contains 2; expected 0 to 1"),
    ("packed_group_matmul",
     (torch.ones(2, 7), torch.ones(1, 1, 4, 32, 2), None, offsets_of([2]), None, 3), "7 columns"),
    ("packed_group_matmul",
     (torch.ones(2, 8), torch.ones(1, 1, 4, 32, 2), torch.ones(1, 4), offsets_of([2]), None, 3),
     "bias is"),
    ("combine_experts", (torch.ones(2, 8), torch.tensor([[0, 2]]).int(), torch.ones(1, 2)),
     "places contains 2; expected 0 to 1"),
    ("combine_experts", (torch.ones(2, 8), torch.tensor([[0, 1]]).int(), torch.ones(1, 3)),
     "expert_weights is"),
])
def test_wrong_arguments(kernels: Kernels, name: str, args: tuple, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        kernels(name, *args)
