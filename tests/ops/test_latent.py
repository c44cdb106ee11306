"""Latent attention: what the ops mean, and when which form is cheaper."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from xllm.ops import REGISTRY
from xllm.ops.attention import attention
from xllm.ops.latent import (
    FEWEST_EXPANDED,
    HeadSizes,
    expands,
    form_flops,
    latent_attention,
    latent_write,
    paged_latent_attention,
)
from xllm.ops.samples import ragged_batch

DEEPSEEK = HeadSizes(nope=128, rope=64, rank=512, value=128)
SEEDS = st.integers(0, 2**32)
FEW = settings(max_examples=15, deadline=None)
BY_DTYPE = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)


def drawn(seed: int, dtype: torch.dtype = torch.float32) -> tuple:
    """Arguments of ``latent_attention``."""
    return REGISTRY["latent_attention"].sample(random.Random(seed), dtype)


def matrices(weight: Tensor, heads: int, nope: int) -> tuple[Tensor, Tensor]:
    """``w_uk [H, N, R]`` and ``w_uv [H, R, V]`` of a checkpoint's weight."""
    both = weight.unflatten(0, (heads, -1))
    return both[:, :nope], both[:, nope:].transpose(1, 2)


@FEW
@given(seed=SEEDS)
def test_it_is_attention_over_expanded_keys_and_values(seed: int) -> None:
    """Head by head, as the papers write it."""
    q_nope, q_rope, latent, k_rope, weight, scale = drawn(seed)
    heads, nope = q_nope.shape[2:]
    got = latent_attention(q_nope, q_rope, latent, k_rope, weight, scale)
    for head, (w_uk, w_uv) in enumerate(zip(*matrices(weight, heads, nope), strict=True)):
        q = torch.cat((q_nope[:, :, head], q_rope[:, :, head]), -1).unsqueeze(2)
        k = torch.cat((latent @ w_uk.T, k_rope), -1).unsqueeze(2)
        want = attention(q, k, (latent @ w_uv).unsqueeze(2), scale)
        torch.testing.assert_close(got[:, :, head], want[:, :, 0], rtol=1e-4, atol=1e-5)


@FEW
@given(seed=SEEDS)
def test_absorbed_is_the_same(seed: int) -> None:
    """One KV head that holds the latent: the form that decoding uses, in float64."""
    q_nope, q_rope, latent, k_rope, weight, scale = drawn(seed, torch.float64)
    w_uk, w_uv = matrices(weight, *q_nope.shape[2:])
    q = torch.cat((torch.einsum("bthn,hnr->bthr", q_nope, w_uk), q_rope), -1)
    k = torch.cat((latent, k_rope), -1).unsqueeze(2)
    mixed = attention(q, k, latent.unsqueeze(2), scale)
    want = latent_attention(q_nope, q_rope, latent, k_rope, weight, scale)
    torch.testing.assert_close(torch.einsum("bthr,hrv->bthv", mixed, w_uv), want)


@BY_DTYPE
@FEW
@given(seed=SEEDS)
def test_paged_is_plain_per_sequence(dtype: torch.dtype, seed: int) -> None:
    """Every sequence of a ragged batch against plain attention over its whole history."""
    batch = ragged_batch(random.Random(seed), 4)
    generator = torch.Generator().manual_seed(seed)
    heads, sizes = 3, HeadSizes(8, 4, 16, 12)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    weight = randn(heads * (sizes.nope + sizes.value), sizes.rank) / 4
    cache = torch.full((int(batch["num_pages"]), 4, 20), float("nan"), dtype=dtype)
    table, starts = batch["block_table"], batch["query_start_loc"].tolist()
    q_nope, q_rope = (randn(len(batch["positions"]), heads, n) for n in (sizes.nope, sizes.rope))
    want = []
    for row, length in enumerate(batch["seq_lens"].tolist()):
        latent, k_rope = randn(length, sizes.rank), randn(length, sizes.rope)
        slots = table[row].long().repeat_interleave(4)[:length] * 4 + torch.arange(length) % 4
        latent_write(latent, k_rope, cache, slots)
        begin, end = starts[row : row + 2]
        before = length - (end - begin)
        q = (torch.cat((x.new_zeros(before, *x.shape[1:]), x[begin:end])) for x in (q_nope, q_rope))
        one = (x.unsqueeze(0) for x in (*q, latent, k_rope))
        want.append(latent_attention(*one, weight, 0.3)[0, before:])
    got = paged_latent_attention(
        q_nope, q_rope, cache, table, batch["query_start_loc"], batch["seq_lens"],
        *matrices(weight, heads, sizes.nope), 0.3)
    bound = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]  # keys and values are not rounded
    torch.testing.assert_close(got, torch.cat(want), rtol=bound, atol=bound)


def test_write_puts_the_latent_first() -> None:
    cache = torch.zeros(3, 2, 5)
    latent, k_rope = torch.ones(2, 3), torch.full((2, 2), 2.0)
    latent_write(latent, k_rope, cache, torch.tensor([5, 2]))
    row, zero = [1.0, 1.0, 1.0, 2.0, 2.0], [0.0] * 5
    assert cache.tolist() == [[zero, zero], [row, zero], [zero, row]]


# --- the cost model ------------------------------------------------------------------------------

def counted(new: int, cached: int, sizes: HeadSizes, absorbed: bool) -> int:
    """Operations of one head, counted product by product, key by key."""
    total = 0
    for query in range(new):
        for _ in range(cached + query + 1):
            key, value = (sizes.rank, sizes.rank) if absorbed else (sizes.nope, sizes.value)
            total += 2 * (key + sizes.rope) + 2 * value
    tokens = new if absorbed else cached + new
    return total + tokens * 2 * sizes.rank * (sizes.nope + sizes.value)


@given(new=st.integers(1, 9), cached=st.integers(0, 9),
       sizes=st.builds(HeadSizes, *[st.integers(1, 600)] * 4))
def test_flops_are_those_of_the_products(new: int, cached: int, sizes: HeadSizes) -> None:
    assert form_flops(new, cached, sizes) == (
        counted(new, cached, sizes, True), counted(new, cached, sizes, False))


@given(cached=st.integers(0, 10**6), sizes=st.builds(HeadSizes, *[st.integers(1, 2048)] * 4))
def test_decoding_is_absorbed(cached: int, sizes: HeadSizes) -> None:
    assert not expands(1, cached, sizes)


@given(new=st.integers(1, 5000), cached=st.integers(0, 10**6))
def test_more_new_tokens_favour_expanding_and_more_cached_ones_do_not(
        new: int, cached: int) -> None:
    if expands(new, cached, DEEPSEEK):
        assert expands(new + 1, cached, DEEPSEEK)
    else:
        assert not expands(new, cached + 1, DEEPSEEK)


@pytest.mark.parametrize(("new", "cached", "expanded"), [
    (FEWEST_EXPANDED - 1, 0, False), (FEWEST_EXPANDED, 0, True), (2048, 0, True),
    (170, 10**6, False), (171, 10**6, True), (64, 4096, False), (512, 4096, True),
])
def test_where_deepseek_changes_form(new: int, cached: int, expanded: bool) -> None:
    assert expands(new, cached, DEEPSEEK) == expanded


def test_a_rank_too_small_to_absorb_at_length() -> None:
    """MiniCPM3: R 256, N 64, V 64: the same rule, other crossing."""
    sizes = HeadSizes(64, 32, 256, 64)
    crossing = next(n for n in range(1, 999) if expands(n, 10**6, sizes))
    assert crossing == 86


@pytest.mark.parametrize(("form", "index"), [("absorbed", 0), ("expanded", 1), (None, 0)])
def test_cost_is_that_of_the_form(form: str | None, index: int) -> None:
    sizes = HeadSizes(8, 4, 16, 8)
    args = (torch.empty(2, 3, 8), torch.empty(2, 3, 4), torch.empty(9, 4, 20),
            torch.zeros(1, 5, dtype=torch.int32), torch.tensor([0, 2]), torch.tensor([17]),
            torch.empty(3, 8, 16), torch.empty(3, 16, 8), 0.3, form)
    cost = REGISTRY["paged_latent_attention"].cost(*args)
    assert cost.flops == 3 * form_flops(2, 15, sizes)[index]
    assert cost.bytes == 4 * (2 * 3 * (8 + 4 + 8) + 17 * 20 + 2 * 3 * 8 * 16)
