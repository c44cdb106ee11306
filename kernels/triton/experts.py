"""``xllm.group_tokens`` and ``xllm.combine_experts``: rows to experts and back."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from xllm.kernels.triton.launch import same_dtype


@triton.jit
def group(expert_ids: tl.tensor, rows: tl.tensor, places: tl.tensor, offsets: tl.tensor,
          count: tl.tensor, TOP_K: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """One expert's part of a counting sort: count what comes before it, then place its picks.

    Program E places nothing and writes the last offset.
    """
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    smaller = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, count, BLOCK):
        ids = tl.load(expert_ids + first + lane, mask=first + lane < count, other=1 << 30)
        smaller += (ids < expert).to(tl.int32)
    place = tl.sum(smaller, 0)
    tl.store(offsets + expert, place)
    for first in range(0, count, BLOCK):
        pick = first + lane
        ids = tl.load(expert_ids + pick, mask=pick < count, other=1 << 30)
        mine = (ids == expert).to(tl.int32)
        target = place + tl.cumsum(mine, 0) - 1
        tl.store(rows + target, pick // TOP_K, mask=mine != 0)
        tl.store(places + pick, target, mask=mine != 0)
        place += tl.sum(mine, 0)


@triton.jit
def combine(y: tl.tensor, places: tl.tensor, weights: tl.tensor, out: tl.tensor,
            y_stride: tl.tensor, H: tl.constexpr, TOP_K: tl.constexpr,
            BLOCK: tl.constexpr) -> None:
    """``BLOCK`` features of one token; picks are summed in their order.

    A product is rounded where both factors have one narrow type, as the reference does.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for pick in range(TOP_K):
        place = tl.load(places + token * TOP_K + pick).to(tl.int64)
        weight = tl.load(weights + token * TOP_K + pick).to(tl.float32)
        value = tl.load(y + place * y_stride + column, mask=column < H, other=0.0)
        product = weight * value.to(tl.float32)
        if weights.dtype.element_ty == y.dtype.element_ty:
            product = product.to(y.dtype.element_ty).to(tl.float32)
        acc += product
    tl.store(out + token * H + column, acc.to(out.dtype.element_ty), mask=column < H)


def group_tokens(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """``xllm.group_tokens`` on the device: a stable sort in one launch."""
    expert_ids = expert_ids.contiguous()
    count = expert_ids.shape[0] * expert_ids.shape[1]
    sizes = (count,), expert_ids.shape, (num_experts + 1,)
    rows, places, offsets = (expert_ids.new_empty(s, dtype=torch.int32) for s in sizes)
    wrap_triton(group)[(num_experts + 1,)](
        expert_ids, rows, places, offsets, count, expert_ids.shape[1], 1024, num_warps=4)
    return rows, places, offsets


def combine_experts(y: Tensor, places: Tensor, expert_weights: Tensor) -> Tensor:
    """``xllm.combine_experts`` on the device; the same rounding as the reference."""
    same_dtype("combine_experts", y=y)
    (tokens, top_k), width = places.shape, y.shape[1]
    out = y.new_empty((tokens, width))
    block = min(1024, triton.next_power_of_2(width))
    wrap_triton(combine)[(tokens, triton.cdiv(width, block))](
        y, places.contiguous(), expert_weights.contiguous(), out, y.stride(0), width, top_k, block,
        num_warps=4)
    return out
