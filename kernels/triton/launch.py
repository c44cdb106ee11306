"""What launches have in common: tiles by shape, argument checks. Nothing here runs on a device.

Sizes may be symbolic. A choice by size is made for numbers only; a symbolic size takes the choice
for large batches, so that one trace serves every size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from xllm.errors import UserError

LOG2_E = math.log2(math.e)
LARGE = 1 << 30  # the number of rows that a symbolic size stands for
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class KernelArgument(UserError, ValueError):
    """An argument that a kernel does not take; names op, argument, value and what is accepted."""


@dataclass(frozen=True)
class Tile:
    """Rows and columns (or keys) of a tile, warps, and stages of the software pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


def query_rows(tokens: int, sequences: int, ratio: int) -> int:
    """Rows that one sequence has on average for a KV head; :data:`LARGE` where symbolic."""
    if isinstance(tokens, torch.SymInt) or isinstance(sequences, torch.SymInt):
        return LARGE
    return -(-tokens // max(sequences, 1)) * ratio


def query_tiles(tokens: int, sequences: int, ratio: int, block: int) -> int:
    """Tiles enough for any split of ``tokens`` over ``sequences`` (see ``tiles.segment_of``)."""
    return tokens * ratio // block + sequences


def same_dtype(op: str, **tensors: Tensor) -> None:
    """Refuse tensors of several dtypes, of one without a kernel, or strided in the last dimension.
    """
    (first, one), *_ = tensors.items()
    for name, tensor in tensors.items():
        if tensor.dtype != one.dtype or tensor.dtype not in DTYPES:
            raise KernelArgument(f"{op}: {name} is {tensor.dtype}; accepted: the dtype of {first}, "
                                 f"one of {', '.join(map(str, DTYPES))}")
        if tensor.stride(-1) != 1:
            raise KernelArgument(f"{op}: the last dimension of {name} has stride "
                                 f"{tensor.stride(-1)}; accepted: 1")


def group_rows(count: int, experts: int) -> int:
    """Rows of an expert on average, of those that have any; :data:`LARGE` where symbolic."""
    return LARGE if isinstance(count, torch.SymInt) else -(-count // experts)


def group_tiles(count: int, experts: int, block: int) -> int:
    """Tiles enough for any split of ``count`` rows over ``experts`` and the rows behind them."""
    return torch.sym_min(count, (count + (experts + 1) * (block - 1)) // block)
