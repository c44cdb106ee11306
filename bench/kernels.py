"""How fast are the CPU kernels, next to the machine's limits and to torch's own operators?

    python bench/kernels.py [--out FILE] [--isa ISA] [--only linear|decode|prefill]

Shapes are Qwen3-0.6B's. Times are the best of several rounds in which ours and torch's take turns,
so that a neighbour on the machine slows both. One call's weights rotate through copies larger than
the last-level cache where they fit it, as they do in a model.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

import common
from xllm.kernels import build
from xllm.ops.linear import pack

PROBE = r"""
#include <cstdint>
#include "vec.h"
using namespace xllm;
extern "C" double read_all(const float* p, int64_t n) {
  double total = 0;
  #pragma omp parallel for reduction(+:total) schedule(static)
  for (int64_t block = 0; block < n / 16384; block++) {
    Vec sum[4] = {};
    for (int64_t i = 0; i < 16384; i += 4 * VL)
      for (int j = 0; j < 4; j++) sum[j] += load(p + block * 16384 + i + j * VL);
    total += xllm::sum(sum[0] + sum[1] + sum[2] + sum[3]);
  }
  return total;
}
template <class Step> double spin(int64_t n, Step step) {
  double total = 0;
  #pragma omp parallel reduction(+:total)
  {
    Vec sum[12] = {}, x = splat(1e-3f);
    asm volatile("" : "+m"(x));
    for (int64_t i = 0; i < n; i++)
      for (int j = 0; j < 12; j++) sum[j] = step(sum[j], x);
    for (int j = 0; j < 12; j++) total += xllm::sum(sum[j]);
  }
  return total;
}
extern "C" double spin_fma(int64_t n) {
  return spin(n, [](Vec sum, Vec x) { return fma(x, x, sum); });
}
extern "C" double spin_bf16(int64_t n) {
#if defined(__AVX512BF16__)
  return spin(n, [](Vec sum, Vec x) {
    return (Vec)_mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)x); });
#else
  return spin_fma(n);
#endif
}
extern "C" int lanes() { return VL; }
extern "C" int bf16_pairs() {
#if defined(__AVX512BF16__)
  return 2;
#else
  return 1;
#endif
}
"""
LINEARS = ((1024, 4096), (2048, 1024), (1024, 6144), (3072, 1024), (1024, 151936))
ATTENTION = (("decode", 1, 1024), ("decode", 1, 8192), ("decode", 8, 1024), ("prefill", 1, 512),
             ("prefill", 1, 2048))
CACHE_BYTES = 300 << 20
HEADS, GROUPS, DIM, PAGE = 16, 8, 128, 16


def best(calls: list[Callable[[], object]], seconds: float) -> list[float]:
    """Shortest time of each call; they take turns for ``seconds`` in all, three rounds at least."""
    times: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    while len(times[0]) < 3 or time.perf_counter() - start < seconds:
        for call, list_ in zip(calls, times, strict=True):
            before = time.perf_counter()
            call()
            list_.append(time.perf_counter() - before)
    return [min(list_) for list_ in times]


class Machine:
    """Limits measured with all of torch's threads: read bandwidth and arithmetic."""

    def __init__(self, folder: Path) -> None:
        features = build.cpu_features()
        isa = next(isa for isa in build.ISA_FLAGS if build.runs_on(isa, features))
        source, library = folder / "probe.cpp", folder / "probe.so"
        source.write_text(PROBE)
        flags = [*build.COMMON_FLAGS, "-fvisibility=default", *build.isa_flags(isa)]
        command = [*build.find_compiler().split(), *flags, f"-I{build.SOURCE_DIR}", "-shared"]
        subprocess.run([*command, "-o", library, source], check=True)
        self.probe = ctypes.CDLL(str(library))
        self.memory = torch.ones(CACHE_BYTES // 2)
        self.bandwidth = self.flops = self.bf16_flops = 0.0
        self.measure()

    @property
    def peak(self) -> float:
        """The faster way to multiply bfloat16 values."""
        return max(self.flops, self.bf16_flops)

    def measure(self) -> None:
        """Raise the limits to what a new measurement reaches."""
        size, steps = self.memory.numel(), 200_000
        pointer, count = ctypes.c_void_p(self.memory.data_ptr()), ctypes.c_int64(size)
        spins = ctypes.c_int64(steps)
        read, fma, bf16 = best([
            lambda: self.probe.read_all(pointer, count),
            lambda: self.probe.spin_fma(spins), lambda: self.probe.spin_bf16(spins),
        ], 1.0)
        flops = 24.0 * steps * self.probe.lanes() * torch.get_num_threads()
        self.bandwidth = max(self.bandwidth, 4 * size / read)
        self.flops = max(self.flops, flops / fma)
        self.bf16_flops = max(self.bf16_flops, flops * self.probe.bf16_pairs() / bf16)


def rows_of_linear(machine: Machine, seconds: float) -> list[tuple]:
    """packed_linear against torch's linear."""
    rows = []
    for k, n in LINEARS:
        copies = max(1, min(48, CACHE_BYTES // (2 * k * n)))
        plain = [torch.randn(n, k).bfloat16() / k**0.5 for _ in range(copies)]
        packed = [pack(w) for w in plain]
        for m in (1, 8, 64, 512):
            x, turn = torch.randn(1, m, k).bfloat16(), iter(range(10**9))
            ours, theirs = best([
                lambda: torch.ops.xllm.packed_linear(x, packed[next(turn) % copies], None, n),
                lambda: linear(x, plain[next(turn) % copies]),
            ], seconds)
            flops, read = 2 * m * k * n, 2 * k * n
            share = max(read / ours / machine.bandwidth, flops / ours / machine.peak)
            rows.append((f"packed_linear {k}x{n}", f"M={m}", ours, theirs, read / ours / 1e9,
                         flops / ours / 1e9, share))
    return rows


def paged(lengths: list[int], new: int) -> tuple[Tensor, ...]:
    """q, cache, block table, starts and lengths of sequences that each add ``new`` tokens."""
    width = -(-max(lengths) // PAGE)
    pages = 1 + torch.randperm(len(lengths) * width, dtype=torch.int32)
    cache = torch.randn(len(pages) + 1, 2, GROUPS, PAGE, DIM).bfloat16()
    q = torch.randn(len(lengths) * new, HEADS, DIM).bfloat16()
    starts = torch.arange(len(lengths) + 1, dtype=torch.int32) * new
    return q, cache, pages.view(-1, width), starts, torch.tensor(lengths, dtype=torch.int32)


def row_of_attention(machine: Machine, sequences: int, length: int, new: int,
                     seconds: float) -> tuple:
    """paged_attention against torch's on contiguous keys and values."""
    arguments = paged([length] * sequences, new)
    q = torch.randn(sequences, HEADS, new, DIM).bfloat16()
    k, v = (torch.randn(sequences, GROUPS, length, DIM).bfloat16() for _ in range(2))
    ours, theirs = best([
        lambda: torch.ops.xllm.paged_attention(*arguments, DIM**-0.5, None, None, None),
        lambda: scaled_dot_product_attention(q, k, v, is_causal=new > 1, enable_gqa=True),
    ], seconds)
    pairs = new * length - new * (new - 1) // 2
    flops, read = 4 * sequences * HEADS * DIM * pairs, 2 * k.nbytes
    share = max(read / ours / machine.bandwidth, flops / ours / machine.peak)
    kind = f"decode, {sequences} sequences" if new == 1 else "prefill"
    return (f"paged_attention {kind}", f"{length} tokens", ours, theirs, read / ours / 1e9,
            flops / ours / 1e9, share)


def cells(name: str, size: str, ours: float, theirs: float, read: float, flops: float,
          share: float) -> tuple[str, ...]:
    """A row as text."""
    return (name, size, f"{ours * 1e3:.3f}", f"{theirs * 1e3:.3f}", f"{theirs / ours:.2f}",
            f"{read:.1f}", f"{flops:.0f}", f"{share * 100:.0f}")


def measure(machine: Machine, only: str | None, seconds: float) -> str:
    """The table, under the limits measured beside it."""
    rows = rows_of_linear(machine, seconds) if only in (None, "linear") else []
    machine.measure()
    for kind, sequences, length in ATTENTION:
        if only in (None, kind):
            new = 1 if kind == "decode" else length
            rows.append(row_of_attention(machine, sequences, length, new, seconds))
    machine.measure()
    limits = (f"Limits measured in the same run: read {machine.bandwidth / 1e9:.1f} GB/s, "
              f"float32 {machine.flops / 1e9:.0f} GFLOP/s, bfloat16 dot product "
              f"{machine.bf16_flops / 1e9:.0f} GFLOP/s. \"% of limit\" is the nearest of them.")
    head = ("kernel", "size", "ms", "torch ms", "speed-up", "GB/s", "GFLOP/s", "% of limit")
    return f"{limits}\n\n{common.table(head, [cells(*row) for row in rows])}"


def main() -> None:
    """Compile, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the table to this markdown file")
    parser.add_argument("--isa", default=build.detect_isa(), choices=list(build.ISA_FLAGS))
    parser.add_argument("--only", choices=["linear", "decode", "prefill"])
    parser.add_argument("--seconds", type=float, default=0.6, help="time per row")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        build.compile_cpu(options.isa, Path(folder) / "kernels.so")
        compiled = time.perf_counter() - started
        torch.ops.load_library(Path(folder) / "kernels.so")
        machine = Machine(Path(folder))
    body = measure(machine, options.only, options.seconds)
    command = shlex.join(["python", "bench/kernels.py", *sys.argv[1:]])
    text = (f"# CPU kernels against torch's operators\n\n{body}\n\n"
            f"* machine: {common.machine()}; kernels for {options.isa}, compiled in "
            f"{compiled:.0f} s\n* date: {datetime.date.today()}\n"
            f"* command: `{command}`\n")
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
