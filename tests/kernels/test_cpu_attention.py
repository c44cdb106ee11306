"""Paged attention in C++: splits of a long context, masks, head layouts, padding, errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from xllm.ops import REGISTRY

Kernels = Callable[..., object]
REFERENCE = REGISTRY["paged_attention"].reference


def batch(
    new: list[int], lengths: list[int], *, heads: int = 4, groups: int = 2, dim: int = 64,
    page_size: int = 16, dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, ...]:
    """q, cache, block table, starts and lengths over shuffled pages; page 0 holds NaN."""
    generator = torch.Generator().manual_seed(sum(new) + sum(lengths) + heads)
    width = max([-(-n // page_size) for n in lengths], default=0) + 1
    pages = torch.randperm(len(new) * width, generator=generator).view(len(new), width) + 1
    shape = (len(new) * width + 1, 2, groups, page_size, dim)
    cache = torch.randn(shape, generator=generator).to(dtype)
    cache[0] = float("nan")
    q = torch.randn(sum(new), heads, dim, generator=generator).to(dtype)
    starts = torch.tensor([0, *new]).cumsum(0).int()
    return q, cache, pages.int(), starts, torch.tensor(lengths, dtype=torch.int32)


def check(kernels: Kernels, args: tuple, *options: object) -> None:
    """float32 within the op's tolerance; bfloat16 as near to float32's result as the reference."""
    scale = args[0].shape[-1] ** -0.5
    got = kernels("paged_attention", *args, scale, *options)
    want = REFERENCE(*args, scale, *options)
    if got.dtype == torch.float32:
        bound = REGISTRY["paged_attention"].tolerance[torch.float32]
        return torch.testing.assert_close(got, want, rtol=bound.relative, atol=bound.absolute)
    exact = REFERENCE(args[0].float(), args[1].float(), *args[2:], scale, *options)
    error, allowed = (got - exact).abs().max(), (want - exact).abs().max()
    assert error <= 1.5 * allowed


NEW_AND_LENGTHS = [
    ([1], [1]), ([1], [16]), ([1], [17]), ([1], [2000]), ([5], [2000]), ([1, 1, 1], [3, 900, 64]),
    ([70], [70]), ([100], [700]), ([1, 33, 1, 2], [65, 40, 1300, 2]), ([512], [512]),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("new", "lengths"), NEW_AND_LENGTHS)
def test_lengths(
    kernels: Kernels, new: list[int], lengths: list[int], dtype: torch.dtype
) -> None:
    args = batch(new, lengths, dtype=dtype)
    check(kernels, args)
    check(kernels, args, 100)
    check(kernels, args, None, 15.0)
    check(kernels, args, 7, 30.0, torch.tensor([-1.0, 0.0, 2.0, 30.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 5, 6, 7, 8, 71])
def test_head_ratios(kernels: Kernels, ratio: int, dtype: torch.dtype) -> None:
    for new, lengths in (([1], [600]), ([1, 20], [40, 30])):
        check(kernels, batch(new, lengths, heads=2 * ratio, dim=32, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [8, 16, 24, 40, 72, 96, 128, 192, 256, 576])
def test_head_sizes(kernels: Kernels, dim: int, dtype: torch.dtype) -> None:
    check(kernels, batch([1, 20, 1], [40, 30, 700], dim=dim, dtype=dtype))


@pytest.mark.parametrize("page_size", [1, 5, 16, 32, 128])
def test_page_sizes(kernels: Kernels, page_size: int) -> None:
    for extra in (-1, 0, 1):
        lengths = [3 * page_size + 1 + extra, 130 * page_size + extra]
        check(kernels, batch([1, 2], lengths, page_size=page_size), 50)


def test_large_scores(kernels: Kernels) -> None:
    """Scores far apart: the running maximum keeps every exponential finite."""
    q, *rest = batch([1, 40], [900, 300])
    for factor in (1e3, -1e3):
        assert kernels("paged_attention", q * factor, *rest, 1.0).isfinite().all()
        check(kernels, (q * 20, *rest))


def test_rows_outside_sequences_are_zero(kernels: Kernels) -> None:
    q, cache, table, starts, lengths = batch([3, 1], [9, 30])
    padded = torch.cat((q[:2] * torch.nan, q, q[:3]))
    out = kernels("paged_attention", padded, cache, table, starts + 2, lengths, 0.1)
    assert out[:2].eq(0).all() and out[6:].eq(0).all()
    torch.testing.assert_close(out[2:6], REFERENCE(q, cache, table, starts, lengths, 0.1))


def test_padded_sequences(kernels: Kernels) -> None:
    """Sequences without new tokens, of length 0 or more, whose block table points at page 0."""
    q, cache, table, starts, lengths = batch([2, 1], [20, 5])
    starts = torch.cat((starts, starts[-1:].expand(3)))
    table = torch.cat((table, torch.zeros(3, table.shape[1], dtype=torch.int32)))
    check(kernels, (q, cache, table, starts, torch.cat((lengths, torch.tensor([0, 1, 9]))).int()))


def test_nothing(kernels: Kernels) -> None:
    q, cache, _, _, _ = batch([1], [5])
    ints = torch.int32
    none = torch.empty(0, 1, dtype=ints), torch.zeros(1, dtype=ints), torch.empty(0, dtype=ints)
    assert kernels("paged_attention", q[:0], cache, *none, 1.0).shape == (0, 4, 64)
    assert kernels("paged_attention", q, cache, *none, 1.0).eq(0).all()


def test_strided_arguments(kernels: Kernels) -> None:
    """q as a view of qkv, the cache as one layer's pages within a cache of two."""
    q, cache, *rest = batch([1, 20], [100, 50])
    wide = torch.stack((cache, cache), dim=1)[:, 1]
    check(kernels, (torch.cat((q, q), dim=1)[:, :4], wide, *rest))


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_threads(kernels: Kernels, threads: int) -> None:
    """The plan depends on the number of threads; its result does not."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        check(kernels, batch([1, 1], [2500, 900], heads=2, groups=1), 2200)
        check(kernels, batch([9], [3000], heads=2, groups=1), None, None, torch.tensor([1.0, 5.0]))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("index", "value", "message"), [
    (2, torch.full((1, 3), 9, dtype=torch.int32), "block_table contains page 9; expected 0 to"),
    (3, torch.tensor([0, 4], dtype=torch.int32), "query_start_loc goes from 0 to 4"),
    (4, torch.tensor([1], dtype=torch.int32), "seq_lens contains 1; expected 3 to"),
    (4, torch.tensor([900], dtype=torch.int32), "seq_lens contains 900; expected 3 to"),
    (4, torch.tensor([20]), "seq_lens is Long"),
    (0, torch.ones(3, 3, 64), "q has 3 heads; expected a multiple of 2"),
    (0, torch.ones(3, 4, 32), "q is Float"),
])
def test_wrong_arguments(kernels: Kernels, index: int, value: Tensor, message: str) -> None:
    args = list(batch([3], [20]))
    args[index] = value
    with pytest.raises(RuntimeError, match=f"paged_attention: {message}"):
        kernels("paged_attention", *args, 0.1)
