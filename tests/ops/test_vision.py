"""Attention within segments means what it says."""

from __future__ import annotations

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from xllm.ops.vision import SEGMENT_ATTENTION, segment_attention


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_is_one_attention_with_a_block_mask(seed: int) -> None:
    q, k, v, bounds, scale = SEGMENT_ATTENTION.sample(random.Random(seed), torch.float32)
    segment = torch.bucketize(torch.arange(len(q)), bounds[1:], right=True)
    mask = segment.unsqueeze(0) == segment.unsqueeze(1)
    heads_first = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    want = scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=scale)
    torch.testing.assert_close(segment_attention(q, k, v, bounds, scale),
                               want[0].transpose(0, 1), rtol=1e-4, atol=1e-5)


def test_rows_outside_every_segment_are_zero() -> None:
    q, k, v = torch.randn(3, 9, 2, 8, generator=torch.Generator().manual_seed(0))
    out = segment_attention(q, k, v, torch.tensor([2, 5, 5, 8], dtype=torch.int32), 1.0)
    assert not out[:2].any() and not out[8:].any() and out[2:8].all()


def test_cost_counts_pairs_within_segments() -> None:
    q = torch.zeros(6, 2, 8)
    whole, parts = (SEGMENT_ATTENTION.cost(q, q, q, torch.tensor(bounds, dtype=torch.int32), 1.0)
                    for bounds in ([0, 6], [0, 3, 6]))
    assert (whole.flops, parts.flops) == (4 * 36 * 16, 4 * 18 * 16)
    assert whole.bytes == parts.bytes == 4 * 4 * q.numel()
