"""``xllm.paged_attention``: ragged causal attention over paged keys and values.

A tile of queries is a run of (token, head) rows that share one KV head, so that each key is read
once for all its heads. The context is split where tiles are too few to fill the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from xllm.kernels.triton.launch import LOG2_E, Tile, query_rows, query_tiles, same_dtype
from xllm.kernels.triton.softmax import (
    first_state,
    merged,
    splits_for,
    step,
    store,
    visible,
    workspace,
)
from xllm.kernels.triton.tiles import first_tile, key_range, slots_of


@triton.jit
def tanh(x: tl.tensor) -> tl.tensor:
    """Hyperbolic tangent by ``exp``; 1 where that overflows."""
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def scan(queries: tl.tensor, positions: tl.tensor, base: tl.tensor, table: tl.tensor,
         begin: tl.tensor, end: tl.tensor, most: tl.tensor, total: tl.tensor, factor: tl.tensor,
         cap: tl.tensor, window: tl.tensor, page_stride: tl.tensor, kv_stride: tl.tensor,
         slot_stride: tl.tensor, PAGE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
         BLOCK_N: tl.constexpr) -> tl.tensor:
    """(weighted sum of values, maximum, sum) over the keys of one range."""
    dims = tl.arange(0, BLOCK_D)[None, :]
    acc = tl.zeros((queries.shape[0], BLOCK_D), tl.float32)
    for first in range(begin, end, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        slots = slots_of(base, table, keys, end, page_stride, slot_stride, PAGE)[:, None] + dims
        mask = (keys < end)[:, None] & (dims < D)
        key = tl.load(slots, mask=mask, other=0.0)
        scores = tl.dot(queries, tl.trans(key), input_precision="ieee") * factor
        if cap is not None:
            scores = cap * tanh(scores)
        scores = visible(scores, positions, keys, end, window)
        weights, shrink, most, total = step(scores, most, total)
        value = tl.load(slots + kv_stride, mask=mask, other=0.0)
        acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
    return acc, most, total


@triton.jit
def attend(q: tl.tensor, cache: tl.tensor, block_table: tl.tensor, query_start_loc: tl.tensor,
           seq_lens: tl.tensor, sinks: tl.tensor, out: tl.tensor, sums: tl.tensor,
           factor: tl.tensor, cap: tl.tensor, window: tl.tensor, sequences: tl.tensor,
           count: tl.tensor, table_stride: tl.tensor, q_stride: tl.tensor, head_stride: tl.tensor,
           page_stride: tl.tensor, kv_stride: tl.tensor, group_stride: tl.tensor,
           slot_stride: tl.tensor, HEADS: tl.constexpr, RATIO: tl.constexpr, PAGE: tl.constexpr,
           D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
           SPLITS: tl.constexpr) -> None:
    """One query tile, KV head and split; the last tiles, which see most keys, start first."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    sequence, beyond = 0, sequences
    while beyond - sequence > 1:  # bisection for the last sequence that starts at or before tile
        middle = (sequence + beyond) // 2
        later = first_tile(tl.load(query_start_loc + middle), middle, RATIO, BLOCK_M) > tile
        sequence, beyond = tl.where(later, sequence, middle), tl.where(later, middle, beyond)
    start = tl.load(query_start_loc + sequence)
    new = tl.load(query_start_loc + tl.minimum(sequence + 1, sequences)) - start
    local = tile - first_tile(start, sequence, RATIO, BLOCK_M)
    if (local < 0) | (local * BLOCK_M >= new * RATIO):
        return
    group, split, before = tl.program_id(1), tl.program_id(2), tl.load(seq_lens + sequence) - new
    rows, dims = local * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)[None, :]
    token, head = rows // RATIO, group * RATIO + rows % RATIO
    at = (start + token).to(tl.int64) * q_stride + head * head_stride
    queries = tl.load(q + at[:, None] + dims, mask=(token < new)[:, None] & (dims < D), other=0.0)
    most, total = first_state(sinks, head, split, BLOCK_M)
    begin, end = key_range(local, new, before, window, split, RATIO, BLOCK_M, BLOCK_N, SPLITS)
    acc, most, total = scan(
        queries, before + token, cache + group * group_stride,
        block_table + sequence * table_stride, begin, end, most, total, factor, cap, window,
        page_stride, kv_stride, slot_stride, PAGE, D, BLOCK_D, BLOCK_N)
    store(acc, most, total, out, sums, (start + token) * HEADS + head, count, split, token < new,
          D, BLOCK_D)


def tile_for(rows: int, dim: int, dtype: torch.dtype) -> Tile:
    """Tile by query rows per sequence and KV head, and by bytes of a key."""
    size = triton.next_power_of_2(dim) * dtype.itemsize
    if size > 1024:
        return Tile(16, 16, 4, 1)
    if size > 256:
        return Tile(16 if rows <= 16 else 32, 32, 4, 2)
    if rows <= 32:
        return Tile(16 if rows <= 16 else 32, 64, 4, 3)
    return Tile(64, 64, 4, 3) if rows <= 64 else Tile(128, 64, 8, 3)


def paged_attention(
    q: Tensor, kv_cache: Tensor, block_table: Tensor, query_start_loc: Tensor, seq_lens: Tensor,
    scale: float, window: int | None = None, softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """``xllm.paged_attention`` on the device; cache and q are contiguous in their last dimension.

    Splits and tiles follow from shapes alone. Numerics: the weights of a block are rounded to q's
    dtype before they meet the values, everything else is float32.
    """
    same_dtype("paged_attention", q=q, kv_cache=kv_cache)
    (tokens, heads, dim), sequences = q.shape, block_table.shape[0]
    groups, page = kv_cache.shape[2], kv_cache.shape[3]
    ratio = heads // groups
    tile = tile_for(query_rows(tokens, sequences, ratio), dim, q.dtype)
    tiles = query_tiles(tokens, sequences, ratio, tile.rows)
    splits = splits_for(tiles, groups)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    parts, sums = workspace(out, splits)
    wrap_triton(attend)[(tiles, groups, splits)](
        q, kv_cache, block_table, query_start_loc, seq_lens, sinks, parts, sums,
        scale * LOG2_E if softcap is None else scale / softcap,
        None if softcap is None else softcap * LOG2_E, window, sequences, tokens * heads,
        block_table.stride(0), *q.stride()[:2], *kv_cache.stride()[:4], heads, ratio, page, dim,
        max(16, triton.next_power_of_2(dim)), tile.rows, tile.keys, splits,
        num_warps=tile.warps, num_stages=tile.stages,
    )
    return merged(out, parts, sums, query_start_loc)
