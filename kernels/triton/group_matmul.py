"""``xllm.group_matmul``: one matrix product per expert, over rows gathered on the fly.

A program finds its expert and rows from the offsets on the device. The grid is an upper bound by
shapes: an expert adds at most one tile that is not full, and there are no more tiles than rows.
Tiles of one expert run next to each other, so that its weights are read from memory once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from xllm.kernels.triton.launch import Tile, group_rows, group_tiles, same_dtype
from xllm.kernels.triton.tiles import expert_tile


@triton.jit
def multiply(x: tl.tensor, weight: tl.tensor, bias: tl.tensor, offsets: tl.tensor,
             rows: tl.tensor, out: tl.tensor, count: tl.tensor, x_stride: tl.tensor,
             expert_stride: tl.tensor, weight_stride: tl.tensor, EXPERTS: tl.constexpr,
             H: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK_E: tl.constexpr,
             BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr) -> None:
    """One tile of rows and ``BLOCK_N`` outputs; expert E stands for rows behind the last offset."""
    experts = tl.arange(0, BLOCK_E)
    begins = tl.load(offsets + experts, mask=experts <= EXPERTS, other=0)
    ends = tl.load(offsets + experts + 1, mask=experts < EXPERTS, other=0)
    ends = tl.where(experts == EXPERTS, count, ends)
    expert, first, end = expert_tile(begins, ends, tl.program_id(0), BLOCK_M)
    if first >= end:
        return
    row, column = first + tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    source = row if rows is None else tl.load(rows + row, mask=row < end, other=0)
    deep = tl.arange(0, BLOCK_K)
    at_x = x + source.to(tl.int64)[:, None] * x_stride + deep[None, :]
    at_weight = weight + expert.to(tl.int64) * expert_stride
    at_weight += column[None, :] * weight_stride + deep[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    depth = tl.where(expert < EXPERTS, H, 0)
    for k in range(0, depth, BLOCK_K):
        known = deep < H - k
        a = tl.load(at_x + k, mask=(row < end)[:, None] & known[None, :], other=0.0)
        b = tl.load(at_weight + k, mask=(column < OUTPUTS)[None, :] & known[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    if bias is not None:
        known = column < tl.where(expert < EXPERTS, OUTPUTS, 0)
        added = tl.load(bias + expert * OUTPUTS + column, mask=known, other=0.0)
        acc += added.to(tl.float32)[None, :]
    at = row.to(tl.int64)[:, None] * OUTPUTS + column[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty),
             mask=(row < end)[:, None] & (column < OUTPUTS)[None, :])


def tile_for(rows: int, dtype: torch.dtype) -> tuple[Tile, int]:
    """Tile by average rows of an expert that has some, and the depth of a step.

    Few rows: memory-bound, so narrow tiles give many programs, each with deep loads under way.
    """
    if dtype == torch.float32:
        return (Tile(16, 64, 4, 3), 32) if rows <= 16 else (Tile(64, 64, 4, 3), 32)
    if rows <= 16:
        return Tile(16, 64, 4, 4), 128
    if rows <= 64:
        return Tile(64, 128, 4, 4), 64
    return Tile(128, 128, 8, 4), 64


def group_matmul(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor,
                 rows: Tensor | None) -> Tensor:
    """``xllm.group_matmul`` on the device; products are summed in float32 and rounded once."""
    same_dtype("group_matmul", x=x, weight=weight)
    count, (experts, outputs, width) = (x if rows is None else rows).shape[0], weight.shape
    tile, depth = tile_for(group_rows(count, experts), x.dtype)
    out = x.new_empty((count, outputs))
    grid = (group_tiles(count, experts, tile.rows), triton.cdiv(outputs, tile.keys))
    wrap_triton(multiply)[grid](
        x, weight, bias, offsets, rows, out, count, x.stride(0), weight.stride(0),
        weight.stride(1), experts, width, outputs, triton.next_power_of_2(experts + 1), tile.rows,
        tile.keys, depth, num_warps=tile.warps, num_stages=tile.stages,
    )
    return out
