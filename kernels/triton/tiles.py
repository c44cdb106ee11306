"""Which part of a ragged batch a program works on, found on the device: no size leaves it.

A segment is a run of rows: a sequence's queries, or the rows that one expert sees. A tile is a
block of rows of one segment. A grid has at least as many programs as there are tiles, counted from
shapes alone; those without a tile end at once.

The functions here take no pointers that a store's address could depend on: torch's analysis of what
a kernel mutates follows addresses through calls, and would count those tensors in.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def first_tile(start: tl.tensor, segment: tl.tensor, SCALE: tl.constexpr,
               BLOCK: tl.constexpr) -> tl.tensor:
    """First tile of a segment whose rows begin at ``start * SCALE``.

    Segments share no tile, and ``rows // BLOCK + segments`` tiles are enough for all. Source: the
    tile numbering of vLLM's unified attention kernel.
    """
    return start * SCALE // BLOCK + segment


@triton.jit
def expert_tile(begin: tl.tensor, end: tl.tensor, tile: tl.tensor,
                BLOCK: tl.constexpr) -> tl.tensor:
    """(segment, first row, end of its rows) of a tile, from all segments' bounds.

    Past the last tile, both rows are 0.
    """
    tiles = (end - begin + BLOCK - 1) // BLOCK
    last = tl.cumsum(tiles, 0)
    segment = tl.sum((last <= tile).to(tl.int32), 0)
    mine = tl.arange(0, begin.shape[0]) == segment
    first = tl.sum(tl.where(mine, begin + (tile - last + tiles) * BLOCK, 0), 0)
    return segment, first, tl.sum(tl.where(mine, end, 0), 0)


@triton.jit
def key_range(local: tl.tensor, new: tl.tensor, before: tl.tensor, window: tl.tensor,
              split: tl.tensor, RATIO: tl.constexpr, BLOCK_M: tl.constexpr,
              BLOCK_N: tl.constexpr, SPLITS: tl.constexpr) -> tl.tensor:
    """(first, end) of the keys that split ``split`` of a query tile looks at; may be empty."""
    begin = 0
    if window is not None:
        begin = tl.maximum(before + local * BLOCK_M // RATIO + 1 - window, 0)
    end = before + tl.minimum(new, ((local + 1) * BLOCK_M - 1) // RATIO + 1)
    size = tl.cdiv(tl.cdiv(end - begin, BLOCK_N), SPLITS) * BLOCK_N
    begin += split * size
    return begin, tl.minimum(end, begin + size)


@triton.jit
def slots_of(base: tl.tensor, table: tl.tensor, keys: tl.tensor, end: tl.tensor,
             page_stride: tl.tensor, slot_stride: tl.tensor, PAGE: tl.constexpr) -> tl.tensor:
    """Pointers to the first value of cached positions ``keys``; into page 0 past ``end``."""
    page = tl.load(table + keys // PAGE, mask=keys < end, other=0).to(tl.int64)
    return base + page * page_stride + (keys % PAGE) * slot_stride
