"""Softmax over keys that come block by block, and the merge of splits of the context.

Scores are kept in units of log 2, so that ``exp2`` serves. Source: Dao et al. 2022
(FlashAttention), 2023 (flash-decoding).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

LOG2_E = tl.constexpr(1.4426950408889634)
WANTED_PROGRAMS = 256  # about two per multiprocessor
MOST_SPLITS = 32


@triton.jit
def visible(scores: tl.tensor, queries: tl.tensor, keys: tl.tensor, end: tl.tensor,
            window: tl.tensor) -> tl.tensor:
    """Scores with -inf where a key lies past ``end``, after its query, or before the window."""
    seen = (keys[None, :] <= queries[:, None]) & (keys[None, :] < end)
    if window is not None:
        seen = seen & (keys[None, :] > queries[:, None] - window)
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def first_state(sinks: tl.tensor, head: tl.tensor, split: tl.tensor,
                BLOCK: tl.constexpr) -> tl.tensor:
    """(maximum, sum) before any key: nothing, or the head's sink in the first split."""
    most = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2_E
        most = tl.where(split == 0, sink, most)
        total += tl.where(split == 0, 1.0, 0.0)
    return most, total


@triton.jit
def step(scores: tl.tensor, most: tl.tensor, total: tl.tensor) -> tl.tensor:
    """One block: (weights, factor of what was summed before, new maximum, new sum).

    A row that has seen no key yet keeps -inf and 0.
    """
    new_most = tl.maximum(most, tl.max(scores, 1))
    shift = tl.where(new_most == float("-inf"), 0.0, new_most)
    weights = tl.exp2(scores - shift[:, None])
    factor = tl.exp2(most - shift)
    return weights, factor, new_most, total * factor + tl.sum(weights, 1)


@triton.jit
def store(acc: tl.tensor, most: tl.tensor, total: tl.tensor, out: tl.tensor, sums: tl.tensor,
          rows: tl.tensor, count: tl.tensor, split: tl.tensor, valid: tl.tensor, D: tl.constexpr,
          BLOCK_D: tl.constexpr) -> None:
    """Write ``out[split, rows]`` of ``[splits, count, D]`` and, if split, its log2 of the sum."""
    total = tl.where(total == 0.0, 1.0, total)
    dims = tl.arange(0, BLOCK_D)
    at = split.to(tl.int64) * count + rows
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + at[:, None] * D + dims[None, :], result,
             mask=valid[:, None] & (dims[None, :] < D))
    if sums is not None:
        tl.store(sums + at, most + tl.log2(total), mask=valid)


@triton.jit
def merge(parts: tl.tensor, sums: tl.tensor, query_start_loc: tl.tensor, out: tl.tensor,
          sequences: tl.tensor, rows: tl.tensor, HEADS: tl.constexpr, D: tl.constexpr,
          BLOCK_D: tl.constexpr, SPLITS: tl.constexpr) -> None:
    """One row of ``out [rows, D]`` from ``parts [SPLITS, rows, D]``; zeros outside sequences."""
    row = tl.program_id(0).to(tl.int64)
    token = row // HEADS
    inside = (token >= tl.load(query_start_loc)) & (token < tl.load(query_start_loc + sequences))
    at = tl.arange(0, SPLITS) * rows + row
    logs = tl.load(sums + at)
    weights = tl.exp2(logs - tl.max(logs, 0))
    dims = tl.arange(0, BLOCK_D)
    values = tl.load(parts + at[:, None] * D + dims[None, :], mask=dims[None, :] < D, other=0.0)
    result = tl.sum(values * weights[:, None], 0) / tl.sum(weights, 0)
    result = tl.where(inside, result, 0.0)  # nobody wrote the parts of a row outside
    tl.store(out + row * D + dims, result.to(out.dtype.element_ty), mask=dims < D)


def splits_for(tiles: int, groups: int) -> int:
    """Parts of the context, a power of two: enough programs to fill a device.

    1 where the number of tiles is symbolic, as it is in graphs for batches of any size.
    """
    if isinstance(tiles, torch.SymInt):
        return 1
    parts = 1
    while parts < MOST_SPLITS and tiles * groups * parts < WANTED_PROGRAMS:
        parts *= 2
    return parts


def workspace(out: Tensor, splits: int) -> tuple[Tensor, Tensor | None]:
    """Where programs write: ``out [T, H, D]`` itself; or parts of it, and a sum for each row."""
    if splits == 1:
        return out, None
    shape = (splits, *out.shape)
    return (out.new_empty(shape, dtype=torch.float32),
            out.new_empty(shape[:-1], dtype=torch.float32))


def merged(out: Tensor, parts: Tensor, sums: Tensor | None, query_start_loc: Tensor) -> Tensor:
    """``out``, filled from its parts if there are any."""
    tokens, heads, dim = out.shape
    if sums is not None:
        wrap_triton(merge)[(tokens * heads,)](
            parts, sums, query_start_loc, out, query_start_loc.shape[0] - 1, tokens * heads,
            heads, dim, triton.next_power_of_2(dim), sums.shape[0], num_warps=4,
        )
    return out
