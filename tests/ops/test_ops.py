"""The vocabulary: fakes agree with references, schemas hold, references mean what they say."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from tests.references import References
from xllm.ops import REGISTRY
from xllm.ops.attention import (
    attention,
    kv_write,
    paged_attention,
    qk_norm_rope_kv_write,
)
from xllm.ops.linear import pack, packed_embedding, packed_linear, unpack
from xllm.ops.norm import add_rms_norm, rms_norm
from xllm.ops.rope import rope
from xllm.ops.samples import ragged_batch

DTYPES = (torch.float32, torch.bfloat16)
BY_OP = pytest.mark.parametrize("name", sorted(REGISTRY))
BY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SEEDS = st.integers(0, 2**32)
FEW = settings(max_examples=12, deadline=None)


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values that depend on the seed only."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tensors(value: object) -> list[Tensor]:
    """Results of an op as a list."""
    return [value] if isinstance(value, Tensor) else list(value or ())


@BY_OP
@BY_DTYPE
@FEW
@given(seed=SEEDS)
def test_fake_agrees_with_reference(name: str, dtype: torch.dtype, seed: int) -> None:
    op = REGISTRY[name]
    arguments = op.sample(random.Random(seed), dtype)
    mode = FakeTensorMode()
    faked = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments]
    with mode:
        got = tensors(op.overload(*faked))
    want = tensors(op.reference(*arguments))
    assert [(t.dtype, t.shape, t.stride()) for t in got] == [
        (t.dtype, t.shape, t.stride()) for t in want]


@BY_OP
def test_opcheck(name: str) -> None:
    """Schema (mutation, aliasing) and fake by torch's own checks."""
    op = REGISTRY[name]
    for seed, dtype in enumerate(DTYPES):
        torch.library.opcheck(op.overload, op.sample(random.Random(seed), dtype),
                              test_utils=("test_schema", "test_faketensor"))


@BY_OP
def test_cost_counts_at_least_reading_and_writing_once(name: str) -> None:
    op = REGISTRY[name]
    arguments = op.sample(random.Random(1), torch.bfloat16)
    cost = op.cost(*arguments)
    assert cost.flops >= 0 and cost.bytes > 0
    assert set(op.tolerance) == set(DTYPES)


@BY_DTYPE
@FEW
@given(seed=SEEDS)
def test_rms_norm_is_that_of_transformers(dtype: torch.dtype, seed: int) -> None:
    x, residual = randn(seed, 1, 5, 16, dtype=dtype), randn(seed + 1, 1, 5, 16, dtype=dtype)
    module = LlamaRMSNorm(16, eps=1e-5)
    module.weight.data = randn(seed + 2, 16, dtype=dtype)
    assert torch.equal(rms_norm(x, module.weight, 1e-5), module(x))
    normed, total = add_rms_norm(x, residual, module.weight, 1e-5)
    assert torch.equal(total, residual + x) and torch.equal(normed, module(residual + x))


@BY_DTYPE
@FEW
@given(seed=SEEDS)
def test_rope_is_that_of_transformers(dtype: torch.dtype, seed: int) -> None:
    q, k = randn(seed, 1, 4, 5, 8, dtype=dtype), randn(seed + 1, 1, 2, 5, 8, dtype=dtype)
    cos, sin = randn(seed + 2, 1, 5, 8, dtype=dtype), randn(seed + 3, 1, 5, 8, dtype=dtype)
    want = apply_rotary_pos_emb(q, k, cos, sin)
    for x, expected in zip((q, k), want, strict=True):
        assert torch.equal(rope(x.transpose(1, 2), cos, sin).transpose(1, 2), expected)


@BY_DTYPE
def test_silu_mul_rounds_between(dtype: torch.dtype) -> None:
    gate, up = randn(0, 3, 8, dtype=dtype), randn(1, 3, 8, dtype=dtype)
    want = torch.nn.SiLU()(gate) * up
    with References():
        assert torch.equal(torch.ops.xllm.silu_mul(gate, up), want)


@FEW
@given(seed=SEEDS, window=st.sampled_from([None, 1, 3, 50]), groups=st.sampled_from([1, 2, 4]))
def test_attention_is_sdpa(seed: int, window: int | None, groups: int) -> None:
    tokens = random.Random(seed).choice([1, 2, 9])
    q, k, v = (randn(seed + i, 1, tokens, h, 8) for i, h in enumerate((4, groups, groups)))
    row, column = torch.arange(tokens).view(-1, 1), torch.arange(tokens)
    mask = (column <= row) & (column > row - (window or tokens))
    want = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(attention(q, k, v, 0.3, window), want.transpose(1, 2))


def test_soft_cap_and_sinks() -> None:
    """One query on one key: the sink takes its share, the cap bounds the score."""
    q, k, v = torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2), torch.full((1, 1, 1, 2), 4.0)
    half = attention(q, k, v, 0.0, sinks=torch.zeros(1))
    torch.testing.assert_close(half, v / 2)
    capped = attention(q, k, v, 1e9, softcap=1.0, sinks=torch.ones(1))
    torch.testing.assert_close(capped, v / 2)


@BY_DTYPE
@FEW
@given(seed=SEEDS, window=st.sampled_from([None, 1, 5]), softcap=st.sampled_from([None, 5.0]))
def test_paged_attention_is_attention_per_sequence(
    dtype: torch.dtype, seed: int, window: int | None, softcap: float | None
) -> None:
    """Every sequence of a ragged batch against plain attention over its whole history."""
    batch = ragged_batch(random.Random(seed), 4)
    table, starts = batch["block_table"], batch["query_start_loc"].tolist()
    cache = torch.full((int(batch["num_pages"]), 2, 2, 4, 8), float("nan"), dtype=dtype)
    q = randn(seed, len(batch["positions"]), 4, 8, dtype=dtype)
    want = []
    for row, length in enumerate(batch["seq_lens"].tolist()):
        k, v = (randn(seed + 2 * row + i, length, 2, 8, dtype=dtype) for i in (1, 2))
        slots = table[row].long().repeat_interleave(4)[:length] * 4 + torch.arange(length) % 4
        kv_write(k, v, cache, slots)
        new = starts[row + 1] - starts[row]
        padded = torch.cat((q.new_zeros(length - new, 4, 8), q[starts[row]:starts[row + 1]]))
        want.append(attention(padded[None], k[None], v[None], 0.3, window, softcap)[0, -new:])
    got = paged_attention(q, cache, table, batch["query_start_loc"], batch["seq_lens"], 0.3,
                          window, softcap)
    torch.testing.assert_close(got, torch.cat(want))


def test_paged_attention_leaves_padding_zero() -> None:
    q, cache = randn(0, 5, 2, 8), randn(1, 3, 2, 2, 4, 8)
    out = paged_attention(q, cache, torch.tensor([[1], [0]], dtype=torch.int32),
                          torch.tensor([0, 2, 2], dtype=torch.int32),
                          torch.tensor([3, 0], dtype=torch.int32), 0.3)
    assert out[:2].abs().min() > 0 and not out[2:].any()


@BY_DTYPE
@FEW
@given(seed=SEEDS)
def test_fused_write_is_its_parts(dtype: torch.dtype, seed: int) -> None:
    qkv, q_norm, k_norm, eps, cos, sin, cache, slots = REGISTRY["qk_norm_rope_kv_write"].sample(
        random.Random(seed), dtype)
    groups, dim = cache.shape[2], cache.shape[4]
    q, k, v = qkv.view(len(qkv), -1, dim).split(
        [qkv.shape[1] // dim - 2 * groups, groups, groups], 1)
    if q_norm is not None:
        q, k = rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)
    want = cache.clone()
    kv_write(rope(k, cos, sin), v, want, slots)
    got = qk_norm_rope_kv_write(qkv, q_norm, k_norm, eps, cos, sin, cache, slots)
    assert torch.equal(got, rope(q, cos, sin)) and torch.equal(cache, want)


@FEW
@given(rows=st.integers(1, 70), pairs=st.integers(1, 9), seed=SEEDS)
def test_pack_round_trip(rows: int, pairs: int, seed: int) -> None:
    weight = randn(seed, rows, 2 * pairs, dtype=torch.bfloat16)
    packed = pack(weight)
    assert packed.shape == (-(-rows // 32), pairs, 32, 2) and packed.is_contiguous()
    assert torch.equal(unpack(packed, rows), weight)
    n, k = rows - 1, 2 * pairs - 1
    assert packed[n // 32, k // 2, n % 32, k % 2] == weight[n, k]
    ids = torch.tensor([[0, rows - 1]])
    assert torch.equal(packed_embedding(packed, ids), weight[ids])
    x, bias = randn(seed, 3, 2 * pairs, dtype=torch.bfloat16), weight[:, 0]
    assert torch.equal(packed_linear(x, packed, bias, rows),
                       torch.nn.functional.linear(x, weight, bias))
