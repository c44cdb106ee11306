"""How much faster is a linear layer when its weight stays quantised?

    python bench/quant_linear.py [--threads N] [--library KERNELS.so]

``quant_linear`` next to ``packed_linear`` on the same layer in bfloat16. All kinds take turns, so
that a neighbour on the machine slows all of them; times are the shortest of all rounds, ratios are
of those. Weights rotate through copies larger than the second-level caches. "GB/s" counts codes,
scales and zero points once.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
from torch import Tensor

import common
from xllm.compiler.build import kernel_library
from xllm.ops.linear import pack
from xllm.ops.quant_linear import draw_codes, pack_codes, pack_grid
from xllm.progress import Reporter

SHAPES = ((2048, 6144), (4096, 4096))  # inputs, outputs
GROUP, COPIES = 128, 8
#: Column → (kind, inputs per scale; None: one per output, zero points).
KINDS = {
    "int8 per channel": ("int8", None, False),
    "fp8, groups of 128": ("fp8", GROUP, False),
    "int4, groups of 128": ("int4", GROUP, False),
    "int4 with zero points": ("int4", GROUP, True),
}
Arguments = tuple[object, ...]


def quantised(width: int, rows: int, kind: str, group: int | None, zeros: bool) -> list[Arguments]:
    """Copies of the arguments behind x."""
    size = group or width
    codes = pack_codes(draw_codes(random.Random(0), rows, width, kind), kind)
    scales = pack_grid(torch.rand(rows, width // size) / width)
    points = pack_grid(torch.ones(rows, width // size, dtype=torch.int8)) if zeros else None
    return [(codes.clone(), scales.clone(), points, None, rows, size) for _ in range(COPIES)]


def rows_of_shape(width: int, rows: int, seconds: float) -> list[list[str]]:
    """Table rows of one layer, one per number of tokens and kind."""
    plain = pack(torch.randn(rows, width).bfloat16() / width**0.5)
    weights: dict[str, list[Arguments]] = {
        "bfloat16": [(plain.clone(), None, rows) for _ in range(COPIES)]}
    weights |= {name: quantised(width, rows, *how) for name, how in KINDS.items()}
    table = []
    for tokens in (1, 4, 16, 64, 512):
        x = torch.randn(1, tokens, width).bfloat16()
        times = measure(x, weights, seconds)
        for name, spent in times.items():
            ratio = min(times["bfloat16"]) / min(spent)
            read = sum(t.nbytes for t in weights[name][0] if isinstance(t, Tensor))
            table.append([f"{width}x{rows}", str(tokens), name, f"{min(spent) * 1e3:.3f}",
                          f"{ratio:.2f}", f"{read / min(spent) / 1e9:.1f}"])
    return table


def measure(x: Tensor, weights: dict[str, list[Arguments]], seconds: float
            ) -> dict[str, list[float]]:
    """Times of each kind, a round after the other; at least five rounds behind a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in weights}
    start, turn = time.perf_counter(), 0
    while turn < 6 or time.perf_counter() - start < seconds:
        for name, copies in weights.items():
            op = torch.ops.xllm.packed_linear if name == "bfloat16" else torch.ops.xllm.quant_linear
            begin = time.perf_counter()
            op(x, *copies[turn % COPIES])
            times[name].append(time.perf_counter() - begin)
        turn += 1
    return {name: spent[1:] for name, spent in times.items()}


def main() -> None:
    """Run and publish."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=2.0, help="time per number of tokens")
    parser.add_argument("--library", type=Path, help="compiled kernels; default: built or cached")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.ops.load_library(options.library or kernel_library(Reporter(quiet=True)))
    rows = [row for shape in SHAPES for row in rows_of_shape(*shape, options.seconds)]
    head = ("layer", "tokens", "weight", "ms", "speed-up", "GB/s")
    common.publish("quant_linear", "Quantised linear layers against bfloat16",
                   common.table(head, rows))


if __name__ == "__main__":
    main()
