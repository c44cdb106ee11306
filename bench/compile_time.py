"""Is the cost of compiling O(distinct layers)? 28 layers against 2 layers of the same shape."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from common import publish, qwen3_06b, save_random, table
from xllm.compiler import build, plan
from xllm.config import CompileConfig
from xllm.progress import Reporter


def compile_once(path: Path, scratch: Path) -> dict[str, float]:
    """Seconds per phase of a compile with cold caches; kernels are built beforehand."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(scratch / "inductor")
    reporter = Reporter(quiet=True)
    planned = plan.plan(CompileConfig(str(path)), scratch / "artifact", reporter)
    artifact = build.compile_model(planned, reporter)
    found = dict(reporter.seconds)
    found["nodes captured"] = artifact.manifest["passes"][0]["nodes"]
    return found


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 28])
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as base:
        paths = {n: save_random(qwen3_06b(n), Path(base) / f"layers-{n}") for n in args.layers}
        build.kernel_library(Reporter(quiet=True))
        compile_once(paths[args.layers[0]], Path(base) / "warm-up")  # precompiled headers
        runs: dict[int, list[dict[str, float]]] = {n: [] for n in args.layers}
        for round_ in range(args.rounds):
            for n in args.layers:
                runs[n].append(compile_once(paths[n], Path(base) / f"{n}-{round_}"))
    best = {n: {k: min(r[k] for r in rs) for k in rs[0]} for n, rs in runs.items()}
    phases = ["capture", "passes", "compile (inductor)"]
    rows = [[n, int(best[n]["nodes captured"]), *(f"{best[n][p]:.1f}" for p in phases),
             f"{sum(best[n][p] for p in phases):.1f}"] for n in args.layers]
    first, last = best[args.layers[0]], best[args.layers[-1]]
    backend = last[phases[2]] / first[phases[2]]
    whole = sum(last[p] for p in phases) / sum(first[p] for p in phases)
    body = table(["layers", "nodes captured", *[p + ", s" for p in phases], "all, s"], rows)
    body += (f"\n\n{args.layers[-1]} layers against {args.layers[0]}: backend {backend:.2f} x, "
             f"whole compile {whole:.2f} x (best of {args.rounds} interleaved rounds).")
    publish("compile_time", "Compile time against the number of layers", body)


if __name__ == "__main__":
    main()
