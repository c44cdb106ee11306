"""Paged latent attention in C++: both forms, their choice, splits, masks, padding, errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from xllm.ops import REGISTRY
from xllm.ops.latent import FORMS, HeadSizes, expands

Kernels = Callable[..., object]
OP = REGISTRY["paged_latent_attention"]
SMALL = HeadSizes(nope=16, rope=8, rank=32, value=24)
BY_FORM = pytest.mark.parametrize("form", FORMS)
BY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def batch(
    new: list[int], lengths: list[int], *, heads: int = 4, sizes: HeadSizes = SMALL,
    page_size: int = 16, dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, ...]:
    """Arguments up to the scale, over shuffled pages; page 0 holds NaN."""
    generator = torch.Generator().manual_seed(sum(new) + sum(lengths) + heads)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    width = max([-(-n // page_size) for n in lengths], default=0) + 1
    pages = torch.randperm(len(new) * width, generator=generator).view(len(new), width) + 1
    cache = randn(len(new) * width + 1, page_size, sizes.rank + sizes.rope)
    cache[0] = float("nan")
    meta = pages.int(), torch.tensor([0, *new]).cumsum(0).int(), torch.tensor(lengths).int()
    q_nope, q_rope = randn(sum(new), heads, sizes.nope), randn(sum(new), heads, sizes.rope)
    w_uk, w_uv = randn(heads, sizes.nope, sizes.rank), randn(heads, sizes.rank, sizes.value)
    w_uk, w_uv = w_uk / sizes.rank**0.5, w_uv / sizes.rank**0.5
    return (q_nope.to(dtype), q_rope.to(dtype), cache.to(dtype), *meta, w_uk.to(dtype),
            w_uv.to(dtype))


def check(kernels: Kernels, args: tuple, form: str | None = None, scale: float = 0.2) -> None:
    """float32 within the op's tolerance; bfloat16 as near to float32's result as rounding it."""
    got, want = kernels(OP.name, *args, scale, form), OP.reference(*args, scale, form)
    if got.dtype == torch.float32:
        bound = OP.tolerance[torch.float32]
        return torch.testing.assert_close(got, want, rtol=bound.relative, atol=bound.absolute)
    floats = [a.float() if a.is_floating_point() else a for a in args]
    exact = OP.reference(*floats, scale, form)
    assert (got - exact).abs().max() <= 1.5 * (want - exact).abs().max()


@BY_FORM
@BY_DTYPE
@pytest.mark.parametrize(("new", "lengths"), [
    ([1], [1]), ([1], [16]), ([1], [97]), ([1], [2000]), ([5], [2000]), ([1, 1, 1], [3, 900, 64]),
    ([70], [70]), ([100], [700]), ([1, 33, 1, 2], [65, 40, 1300, 2]), ([260], [260]),
])
def test_lengths(kernels: Kernels, form: str, dtype: torch.dtype, new: list[int],
                 lengths: list[int]) -> None:
    check(kernels, batch(new, lengths, dtype=dtype), form)


@BY_FORM
@BY_DTYPE
@pytest.mark.parametrize("heads", [1, 2, 3, 15, 16, 17, 40, 128, 150])
def test_heads(kernels: Kernels, form: str, dtype: torch.dtype, heads: int) -> None:
    """Rows of one token fill a part of a tile, a tile, several, and more than one group."""
    check(kernels, batch([1, 3], [300, 40], heads=heads, dtype=dtype), form)


@BY_FORM
@BY_DTYPE
@pytest.mark.parametrize("sizes", [
    HeadSizes(1, 1, 1, 1), HeadSizes(5, 2, 19, 7), HeadSizes(64, 32, 256, 64),
    HeadSizes(24, 10, 48, 72), HeadSizes(128, 64, 512, 128), HeadSizes(40, 3, 33, 130),
], ids=str)
def test_head_sizes(kernels: Kernels, form: str, dtype: torch.dtype, sizes: HeadSizes) -> None:
    check(kernels, batch([1, 20, 1, 2], [40, 30, 700, 5], sizes=sizes, dtype=dtype), form)


@BY_FORM
@pytest.mark.parametrize("page_size", [1, 5, 16, 128])
def test_page_sizes(kernels: Kernels, form: str, page_size: int) -> None:
    for extra in (-1, 0, 1):
        lengths = [3 * page_size + 1 + extra, 50 * page_size + extra]
        check(kernels, batch([1, 2], lengths, page_size=page_size), form)


@BY_FORM
@pytest.mark.parametrize("tokens", [2, 3, 4, 7, 8, 9, 64, 65])
def test_tokens_that_meet_a_matrix_together(kernels: Kernels, form: str, tokens: int) -> None:
    check(kernels, batch([1] * tokens, list(range(1, tokens + 1))), form)


def test_the_kernel_chooses_by_the_cost_model(kernels: Kernels) -> None:
    """The forms round differently: equal to the bit means the same form."""
    sizes, seen = HeadSizes(32, 8, 64, 32), set()
    for cached in (0, 1, 40, 300):
        for new in (2, 15, 16, 17, 63, 64, 65, 100):
            args = batch([new], [new + cached], sizes=sizes)
            absorbed, expanded = (kernels(OP.name, *args, 0.2, form) for form in FORMS)
            assert not torch.equal(absorbed, expanded)
            form = expands(new, cached, sizes)
            assert torch.equal(kernels(OP.name, *args, 0.2), (absorbed, expanded)[form])
            seen.add((form, cached))
    assert {(True, 0), (True, 300), (False, 0), (False, 300)} <= seen


def test_forms_mixed_in_a_batch(kernels: Kernels) -> None:
    check(kernels, batch([1, 90, 1, 40, 2], [500, 90, 30, 60, 2]))


@BY_FORM
def test_large_scores(kernels: Kernels, form: str) -> None:
    """Scores far apart: the running maximum keeps every exponential finite."""
    q_nope, *rest = batch([1, 40], [900, 300])
    for factor in (1e3, -1e3):
        assert kernels(OP.name, q_nope * factor, *rest, 1.0, form).isfinite().all()
    got, want = (run(q_nope * 20, *rest, 0.2) for run in (
        lambda *args: kernels(OP.name, *args, form), OP.reference))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)  # scores of 100 lose digits


@BY_FORM
def test_rows_outside_sequences_are_zero(kernels: Kernels, form: str) -> None:
    q_nope, q_rope, cache, table, starts, *rest = batch([3, 1], [9, 30])
    nope, rope = (torch.cat((q[:2] * torch.nan, q, q[:3])) for q in (q_nope, q_rope))
    out = kernels(OP.name, nope, rope, cache, table, starts + 2, *rest, 0.1, form)
    assert out[:2].eq(0).all() and out[6:].eq(0).all()
    want = OP.reference(q_nope, q_rope, cache, table, starts, *rest, 0.1)
    torch.testing.assert_close(out[2:6], want)


def test_padded_sequences(kernels: Kernels) -> None:
    """Sequences without new tokens, of length 0 or more, whose block table points at page 0."""
    q_nope, q_rope, cache, table, starts, lengths, *matrices = batch([2, 1], [20, 5])
    starts = torch.cat((starts, starts[-1:].expand(3)))
    table = torch.cat((table, torch.zeros(3, table.shape[1], dtype=torch.int32)))
    lengths = torch.cat((lengths, torch.tensor([0, 1, 9]))).int()
    check(kernels, (q_nope, q_rope, cache, table, starts, lengths, *matrices))


def test_nothing(kernels: Kernels) -> None:
    q_nope, q_rope, cache, *_, w_uk, w_uv = batch([1], [5])
    ints = torch.int32
    none = torch.empty(0, 1, dtype=ints), torch.zeros(1, dtype=ints), torch.empty(0, dtype=ints)
    out = kernels(OP.name, q_nope[:0], q_rope[:0], cache, *none, w_uk, w_uv, 1.0)
    assert out.shape == (0, 4, 24)
    assert kernels(OP.name, q_nope, q_rope, cache, *none, w_uk, w_uv, 1.0).eq(0).all()


@BY_FORM
def test_strided_arguments(kernels: Kernels, form: str) -> None:
    """Queries as slices of one tensor, the cache as one layer's pages within a cache of two."""
    q_nope, q_rope, cache, *rest = batch([1, 20], [100, 50])
    nope, rope = torch.cat((q_nope, q_rope), -1).split([16, 8], -1)
    wide = torch.stack((cache, cache), dim=1)[:, 1]
    check(kernels, (nope, rope, wide, *rest), form)


@BY_FORM
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_threads(kernels: Kernels, form: str, threads: int) -> None:
    """The plan depends on the number of threads; its result does not."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        check(kernels, batch([1, 1], [2500, 900], heads=2), form)
        check(kernels, batch([9], [3000], heads=2), form)
    finally:
        torch.set_num_threads(before)


@BY_DTYPE
def test_write(kernels: Kernels, dtype: torch.dtype) -> None:
    """Strided rows, pages of one layer within a cache of two; nothing else is touched."""
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(150, 30, generator=generator).to(dtype)
    latent, k_rope = both[:, 1:20], both[:, 22:25]
    slots = torch.randperm(160, generator=generator)[:150]
    caches = [torch.zeros(10, 2, 16, 22, dtype=dtype) for _ in range(2)]
    kernels("latent_write", latent, k_rope, caches[0][:, 1], slots)
    REGISTRY["latent_write"].reference(latent, k_rope, caches[1][:, 1], slots)
    assert torch.equal(*caches) and caches[0].any()


@pytest.mark.parametrize(("index", "value", "message"), [
    (1, torch.ones(3, 4, 7), r"kv_cache is Float\[4, 16, 40\]; expected Float\[-1, -1, 39\]"),
    (2, torch.ones(3, 16, 41), "kv_cache is"),
    (3, torch.full((1, 3), 9, dtype=torch.int32), "block_table contains page 9; expected 0 to"),
    (4, torch.tensor([0, 4], dtype=torch.int32), "query_start_loc goes from 0 to 4"),
    (5, torch.tensor([1], dtype=torch.int32), "seq_lens contains 1; expected 3 to"),
    (6, torch.ones(4, 15, 32), r"w_uk is Float\[4, 15, 32\]; expected Float\[4, 16, -1\]"),
    (7, torch.ones(4, 24, 32), r"w_uv is Float\[4, 24, 32\]; expected Float\[4, 32, -1\]"),
    (0, torch.ones(3, 4, 16).half(), "q_nope is Half; expected bfloat16"),
    (9, "both", "form is both; expected absorbed or expanded"),
])
def test_wrong_arguments(kernels: Kernels, index: int, value: object, message: str) -> None:
    args = [*batch([3], [20]), 0.1, None]
    args[index] = value
    with pytest.raises(RuntimeError, match=f"paged_latent_attention: {message}"):
        kernels(OP.name, *args)


def test_wrong_slots(kernels: Kernels) -> None:
    with pytest.raises(RuntimeError, match="slot_mapping contains 8; expected 0 to 7"):
        kernels("latent_write", torch.ones(1, 3), torch.ones(1, 2), torch.ones(2, 4, 5),
                torch.tensor([8]))
