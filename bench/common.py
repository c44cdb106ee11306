"""Shared by the benchmarks: one table on the screen, the same table in ``results/``."""

from __future__ import annotations

import datetime
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """Processor, cores and versions."""
    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    capability = torch.backends.cpu.get_cpu_capability()
    return (f"{name}, {torch.get_num_threads()} threads, {capability}; torch {torch.__version__}, "
            f"transformers {transformers.__version__}")


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table with aligned columns."""
    cells = [list(header), *[[str(c) for c in row] for row in rows]]
    widths = [max(len(r[i]) for r in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |"
             for r in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def publish(name: str, title: str, body: str) -> None:
    """Print, and write ``results/<name>.md`` with machine, date and command."""
    command = "python " + shlex.join([f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    text = (f"# {title}\n\n{body}\n\n* machine: {machine()}\n"
            f"* date: {datetime.date.today()}\n* command: `{command}`\n")
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text)


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def median(values: Sequence[float]) -> float:
    """The median."""
    return statistics.median(values)


def read_bandwidth() -> float:
    """Bytes per second that all threads read from memory together (a sum over 1 GiB)."""
    data = torch.ones(1 << 28)
    data.sum()
    return 4 * data.numel() / median([seconds(data.sum) for _ in range(5)])


def qwen3_06b(layers: int = 28) -> transformers.Qwen3Config:
    """Configuration of the shape of Qwen3-0.6B, optionally with fewer layers."""
    return transformers.Qwen3Config(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
        max_position_embeddings=40960, rope_theta=1e6)


def save_random(config: transformers.PretrainedConfig, path: Path) -> Path:
    """A checkpoint of this shape with random bfloat16 weights, unless it is there already."""
    if not (path / "config.json").is_file():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(path)
    return path
