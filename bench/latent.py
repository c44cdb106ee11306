"""Latent attention: what does the absorbed form save in decoding, and when does expanding pay?

    python bench/latent.py [--heads 16] [--cpu-time]

One layer of DeepSeek-V3's sizes (R 512, r 64, N 128, V 128) with fewer heads, bfloat16. Decoding is
compared with what an engine without latent attention does: project the new token's latent to keys
and values of every head, and attend over a cache of those, by our own kernel and by torch's, both
with values padded to the size of keys (torch has no fast path for others). Sides take turns; ratios
are medians over the rounds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import common
from xllm.kernels import build
from xllm.ops.latent import FORMS, HeadSizes, expands, form_flops
from xllm.ops.linear import pack

SIZES = HeadSizes(nope=128, rope=64, rank=512, value=128)
KEY, PAGE, SCALE = SIZES.nope + SIZES.rope, 16, 0.07
DECODE = [(batch, context) for batch in (1, 4) for context in (1024, 8192, 32768)]
PREFILL = [(16, 0), (128, 0), (512, 0), (2048, 0), (16, 4096), (64, 4096), (128, 4096),
           (171, 4096), (256, 4096), (512, 4096)]
Call = Callable[[], object]


def randn(*shape: int) -> Tensor:
    """Random bfloat16 values; large tensors repeat them, which is quicker."""
    count = torch.Size(shape).numel()
    block = torch.randn(min(count, 1 << 20)).bfloat16()
    return block.repeat(-(-count // len(block)))[:count].view(shape)


def metadata(new: list[int], lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Block table over shuffled pages, starts and lengths."""
    width = -(-max(lengths) // PAGE)
    pages = 1 + torch.randperm(len(new) * width, dtype=torch.int32)
    starts = torch.tensor([0, *new]).cumsum(0).int()
    return pages.view(len(new), width), starts, torch.tensor(lengths, dtype=torch.int32)


def latent(heads: int, new: list[int], lengths: list[int]) -> Callable[..., object]:
    """A call of ``paged_latent_attention`` that takes the form."""
    meta = metadata(new, lengths)
    queries = (randn(sum(new), heads, n) for n in (SIZES.nope, SIZES.rope))
    cache = randn(meta[0].numel() + 1, PAGE, SIZES.rank + SIZES.rope)
    matrices = (randn(heads, SIZES.nope, SIZES.rank), randn(heads, SIZES.rank, SIZES.value))
    scaled = (m / SIZES.rank**0.5 for m in matrices)
    return partial(torch.ops.xllm.paged_latent_attention, *queries, cache, *meta, *scaled, SCALE)


def projected(heads: int, batch: int, attend: Call) -> Call:
    """``attend`` behind the projection of the new tokens' latents to keys and values."""
    rows = heads * (SIZES.nope + SIZES.value)
    weight, x = pack(randn(rows, SIZES.rank)), randn(batch, SIZES.rank)

    def run() -> object:
        torch.ops.xllm.packed_linear(x, weight, None, rows)
        return attend()

    return run


def expanded(heads: int, batch: int, context: int) -> tuple[Call, Call]:
    """Decoding over cached keys and values of every head: our kernel and torch's."""
    meta = metadata([1] * batch, [context] * batch)
    cache = randn(meta[0].numel() + 1, 2, heads, PAGE, KEY)
    paged = partial(torch.ops.xllm.paged_attention, randn(batch, heads, KEY), cache, *meta, SCALE)
    q, k, v = (randn(batch, heads, n, KEY) for n in (1, context, context))
    plain = partial(scaled_dot_product_attention, q, k, v, scale=SCALE)
    return projected(heads, batch, paged), projected(heads, batch, plain)


def rounds(calls: list[Call], clock: Callable[[], float], seconds: float) -> list[list[float]]:
    """Times of each call; they take turns, for ``seconds`` in all, five rounds at least."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    begin = time.perf_counter()
    while len(times[0]) < 5 or time.perf_counter() - begin < seconds:
        for call, mine in zip(calls, times, strict=True):
            before = clock()
            call()
            mine.append(clock() - before)
    return times


def ratio(others: list[float], ours: list[float]) -> str:
    """Median over the rounds of theirs / ours."""
    return f"{common.median([a / b for a, b in zip(others, ours, strict=True)]):.2f}"


def decode(heads: int, clock: Callable[[], float], seconds: float) -> str:
    """The table of decoding."""
    rows = []
    for batch, context in DECODE:
        ours, paged, plain = rounds(
            [latent(heads, [1] * batch, [context] * batch), *expanded(heads, batch, context)],
            clock, seconds)
        medians = (f"{common.median(times) * 1e3:.2f}" for times in (ours, paged, plain))
        rows.append((batch, context, *medians, ratio(paged, ours), ratio(plain, ours)))
    return common.table(("batch", "context", "ms", "expanded cache ms", "torch ms",
                         "expanded / ours", "torch / ours"), rows)


def prefill(heads: int, clock: Callable[[], float], seconds: float) -> str:
    """The table of forms."""
    rows = []
    for new, cached in PREFILL:
        run = latent(heads, [new], [new + cached])
        absorbed, expanded = rounds([partial(run, form) for form in FORMS], clock, seconds)
        flops = form_flops(new, cached, SIZES)
        chosen = FORMS[expands(new, cached, SIZES)]
        rows.append((new, cached, *(f"{common.median(t) * 1e3:.1f}" for t in (absorbed, expanded)),
                     ratio(absorbed, expanded), f"{flops[0] / flops[1]:.2f}", chosen))
    return common.table(("new", "cached", "absorbed ms", "expanded ms", "absorbed / expanded",
                         "operations", "chosen"), rows)


def main() -> None:
    """Compile, measure, publish."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=2.0, help="time per row")
    parser.add_argument("--cpu-time", action="store_true",
                        help="one thread and its CPU time: for a machine that does other work")
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    if options.cpu_time:
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        build.compile_cpu(build.detect_isa(), Path(folder) / "kernels.so")
        torch.ops.load_library(Path(folder) / "kernels.so")
    values = options.heads * (KEY + SIZES.value)
    cached = SIZES.rank + SIZES.rope
    kind = "CPU time of one thread" if options.cpu_time else "wall time"
    body = (f"{options.heads} heads; times are {kind}.\n\n## Decoding\n\n"
            f"{decode(options.heads, clock, options.seconds)}\n\n"
            f"The cache holds {cached} values a token instead of {values}: "
            f"{values / cached:.1f} times less.\n\n## New tokens of one sequence, by form\n\n"
            f"{prefill(options.heads, clock, options.seconds)}")
    common.publish("latent", "Latent attention, absorbed and expanded", body)


if __name__ == "__main__":
    main()
