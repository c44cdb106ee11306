"""Attention of a vision tower: one call for all segments, against one call per segment.

    python bench/vision.py [--out FILE] [--seconds N]

The tower is Qwen2.5-VL's: 16 heads of 80, windows of 8 x 8 patches. One call per segment is what
``transformers`` does without flash attention. Both take turns; times are medians.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_window_index

import common
from xllm.compiler.build import kernel_library
from xllm.progress import Reporter

HEADS, DIM, MERGE, WINDOW, PATCH = 16, 80, 2, 112, 14
IMAGES = ((448, 448), (896, 644), (1344, 1344))  # pixels, height and width


def per_segment(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
    """As in ``transformers``: split, attend, concatenate."""
    lengths = bounds.diff().tolist()
    parts = [x.transpose(0, 1).unsqueeze(0).split(lengths, dim=2) for x in (q, k, v)]
    made = [scaled_dot_product_attention(*part, scale=DIM**-0.5).transpose(1, 2)
            for part in zip(*parts, strict=True)]
    return torch.cat(made, dim=1)[0]


def medians(calls: list[Callable[[], object]], seconds: float) -> list[float]:
    """Median time of each call; they take turns."""
    times: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    while len(times[0]) < 3 or time.perf_counter() - start < seconds:
        for call, spent in zip(calls, times, strict=True):
            before = time.perf_counter()
            call()
            spent.append(time.perf_counter() - before)
    return [statistics.median(spent) for spent in times]


def row(height: int, width: int, windows: bool, seconds: float) -> tuple[str, ...]:
    """One image, with attention in windows or over all of it."""
    grid = torch.tensor([[1, height // PATCH, width // PATCH]])
    bounds = (get_vision_window_index(grid, MERGE, WINDOW, PATCH)[1] if windows
              else get_vision_cu_seqlens(grid))
    qkv = torch.randn(int(grid.prod()), 3, HEADS, DIM, dtype=torch.bfloat16).unbind(1)
    ours, theirs = medians([
        lambda: torch.ops.xllm.segment_attention(*qkv, bounds, DIM**-0.5),
        lambda: per_segment(*qkv, bounds)], seconds)
    return (f"{height} x {width}", "windows" if windows else "full", str(len(bounds) - 1),
            f"{ours * 1e3:.2f}", f"{theirs * 1e3:.2f}", f"{theirs / ours:.2f}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the table to this markdown file")
    parser.add_argument("--seconds", type=float, default=4.0, help="time per row")
    options = parser.parse_args()
    torch.ops.load_library(str(kernel_library(Reporter(quiet=True))))
    rows = [row(*image, windows, options.seconds) for image in IMAGES for windows in (True, False)]
    head = ("pixels", "attention", "segments", "ms", "one call each, ms", "speed-up")
    text = (f"# Attention of a vision tower, bfloat16\n\n{common.table(head, rows)}\n\n"
            f"* machine: {common.machine()}, shared with other work\n"
            f"* date: {datetime.date.today()}\n"
            f"* command: `{shlex.join(['python', 'bench/vision.py', *sys.argv[1:]])}`\n")
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
