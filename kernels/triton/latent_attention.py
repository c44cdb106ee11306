"""``xllm.paged_latent_attention``, absorbed: attention over cached latents that all heads share.

A cached token is read once for a tile of heads and serves as key and as value. The two matrices are
batched products around the kernel. There is no expanded form: which sequences would gain from it
is known on the device only, and long prompts pay for that with more operations.
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
def scan(queries: tl.tensor, turned: tl.tensor, positions: tl.tensor, cache: tl.tensor,
         table: tl.tensor, begin: tl.tensor, end: tl.tensor, most: tl.tensor, total: tl.tensor,
         factor: tl.tensor, page_stride: tl.tensor, slot_stride: tl.tensor, PAGE: tl.constexpr,
         R: tl.constexpr, ROPE: tl.constexpr, BLOCK_N: tl.constexpr) -> tl.tensor:
    """(weighted sum of latents, maximum, sum) over the keys of one range."""
    ranks = tl.arange(0, queries.shape[1])[None, :]
    ropes = tl.arange(0, turned.shape[1])[None, :]
    acc = tl.zeros(queries.shape, tl.float32)
    for first in range(begin, end, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        slots = slots_of(cache, table, keys, end, page_stride, slot_stride, PAGE)[:, None]
        known = (keys < end)[:, None]
        latent = tl.load(slots + ranks, mask=known & (ranks < R), other=0.0)
        shared = tl.load(slots + R + ropes, mask=known & (ropes < ROPE), other=0.0)
        scores = tl.dot(turned, tl.trans(shared), input_precision="ieee")
        scores = tl.dot(queries, tl.trans(latent), scores, input_precision="ieee") * factor
        scores = visible(scores, positions, keys, end, None)
        weights, shrink, most, total = step(scores, most, total)
        acc = tl.dot(weights.to(latent.dtype), latent, acc * shrink[:, None],
                     input_precision="ieee")
    return acc, most, total


@triton.jit
def attend(q_latent: tl.tensor, q_rope: tl.tensor, cache: tl.tensor, block_table: tl.tensor,
           query_start_loc: tl.tensor, seq_lens: tl.tensor, out: tl.tensor, sums: tl.tensor,
           factor: tl.tensor, sequences: tl.tensor, count: tl.tensor, table_stride: tl.tensor,
           q_stride: tl.tensor, head_stride: tl.tensor, rope_stride: tl.tensor,
           rope_head_stride: tl.tensor, page_stride: tl.tensor, slot_stride: tl.tensor,
           HEADS: tl.constexpr, PAGE: tl.constexpr, R: tl.constexpr, ROPE: tl.constexpr,
           BLOCK_R: tl.constexpr, BLOCK_ROPE: tl.constexpr, BLOCK_M: tl.constexpr,
           BLOCK_N: tl.constexpr, SPLITS: tl.constexpr) -> None:
    """One tile of (token, head) rows and one split of the context, as in paged attention."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    sequence, beyond = 0, sequences
    while beyond - sequence > 1:
        middle = (sequence + beyond) // 2
        later = first_tile(tl.load(query_start_loc + middle), middle, HEADS, BLOCK_M) > tile
        sequence, beyond = tl.where(later, sequence, middle), tl.where(later, middle, beyond)
    start = tl.load(query_start_loc + sequence)
    new = tl.load(query_start_loc + tl.minimum(sequence + 1, sequences)) - start
    local = tile - first_tile(start, sequence, HEADS, BLOCK_M)
    if (local < 0) | (local * BLOCK_M >= new * HEADS):
        return
    split, before = tl.program_id(1), tl.load(seq_lens + sequence) - new
    rows, ranks = local * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)[None, :]
    ropes, at = tl.arange(0, BLOCK_ROPE)[None, :], (start + rows // HEADS).to(tl.int64)[:, None]
    head, valid = (rows % HEADS)[:, None], (rows < new * HEADS)[:, None]
    queries = tl.load(q_latent + at * q_stride + head * head_stride + ranks,
                      mask=valid & (ranks < R), other=0.0)
    turned = tl.load(q_rope + at * rope_stride + head * rope_head_stride + ropes,
                     mask=valid & (ropes < ROPE), other=0.0)
    most, total = first_state(None, rows, split, BLOCK_M)
    begin, end = key_range(local, new, before, None, split, HEADS, BLOCK_M, BLOCK_N, SPLITS)
    acc, most, total = scan(
        queries, turned, before + rows // HEADS, cache, block_table + sequence * table_stride,
        begin, end, most, total, factor, page_stride, slot_stride, PAGE, R, ROPE, BLOCK_N)
    store(acc, most, total, out, sums, start * HEADS + rows, count, split, rows < new * HEADS, R,
          BLOCK_R)


def tile_for(rows: int, rank: int, dtype: torch.dtype) -> Tile:
    """Tile by rows per sequence (all heads) and bytes of a latent.

    64 rows are what a Hopper warp group multiplies at once; the result then takes 128 registers of
    each of 256 threads at rank 512.
    """
    if triton.next_power_of_2(rank) * dtype.itemsize > 1024:
        return Tile(16, 16, 4, 2)
    if rows <= 32:
        return Tile(16 if rows <= 16 else 32, 32, 4, 2)
    return Tile(64, 32, 8, 2)


def paged_latent_attention(
    q_nope: Tensor, q_rope: Tensor, kv_cache: Tensor, block_table: Tensor,
    query_start_loc: Tensor, seq_lens: Tensor, w_uk: Tensor, w_uv: Tensor, scale: float,
    form: str | None = None,
) -> Tensor:
    """``xllm.paged_latent_attention`` on the device, absorbed whatever ``form`` prefers.

    Numerics: the absorbed query, a block's weights and the result in latent space are rounded to
    q's dtype, everything else is float32.
    """
    same_dtype("paged_latent_attention", q_nope=q_nope, q_rope=q_rope, kv_cache=kv_cache,
               w_uk=w_uk, w_uv=w_uv)
    (tokens, heads, _), sequences = q_nope.shape, block_table.shape[0]
    rank, rope = w_uk.shape[2], q_rope.shape[2]
    q_latent = torch.bmm(q_nope.transpose(0, 1), w_uk)  # [H, T, R]
    tile = tile_for(query_rows(tokens, sequences, heads), rank, q_nope.dtype)
    tiles = query_tiles(tokens, sequences, heads, tile.rows)
    splits = splits_for(tiles, 1)
    out = q_nope.new_zeros((tokens, heads, rank))
    parts, sums = workspace(out, splits)
    wrap_triton(attend)[(tiles, splits)](
        q_latent, q_rope, kv_cache, block_table, query_start_loc, seq_lens, parts, sums,
        scale * LOG2_E, sequences, tokens * heads, block_table.stride(0), q_latent.stride(1),
        q_latent.stride(0), *q_rope.stride()[:2], *kv_cache.stride()[:2], heads,
        kv_cache.shape[1], rank, rope, max(16, triton.next_power_of_2(rank)),
        max(16, triton.next_power_of_2(rope)), tile.rows, tile.keys, splits,
        num_warps=tile.warps, num_stages=tile.stages,
    )
    out = merged(out, parts, sums, query_start_loc)
    return torch.bmm(out.transpose(0, 1), w_uv).transpose(0, 1).contiguous()
