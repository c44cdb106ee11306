"""Decode and prefill speed against ``transformers`` generate, same weights, interleaved.

Qwen3-0.6B shape, random bfloat16 weights. Also the fraction of the measured memory read bandwidth
that batch-1 decode uses: each step must read every weight once.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from common import median, publish, qwen3_06b, read_bandwidth, save_random, seconds, table
from xllm import LLM, SamplingParams


def prompts(count: int, length: int) -> list[list[int]]:
    """Random token ids."""
    return torch.randint(1000, (count, length)).tolist()


def time_ours(llm: LLM, ids: list[list[int]], tokens: int) -> float:
    """Seconds to complete all prompts with ``tokens`` tokens each."""
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    return seconds(lambda: llm.generate(ids, params))


def time_theirs(model: torch.nn.Module, ids: list[list[int]], tokens: int) -> float:
    """The same by ``transformers`` generate."""
    x = torch.tensor(ids)
    with torch.inference_mode():
        return seconds(lambda: model.generate(
            x, attention_mask=torch.ones_like(x), max_new_tokens=tokens, do_sample=False,
            pad_token_id=0))


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=9, help="decode steps in a run, plus 1")
    parser.add_argument("--model", type=Path,
                        default=Path(tempfile.gettempdir()) / "qwen3-0.6b-shape")
    args = parser.parse_args()
    path = save_random(qwen3_06b(), args.model)
    llm = LLM(str(path), kv_cache_gib=1)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = None  # never stop early
    engines = {"ours": lambda *a: time_ours(llm, *a), "theirs": lambda *a: time_theirs(model, *a)}
    steps, found = args.tokens - 1, {}
    for run in engines.values():
        run(prompts(1, 8), 2)
    for _ in range(args.rounds):
        for batch in (1, 8):
            for name, run in engines.items():
                ids = prompts(batch, 32)
                rate = batch * steps / (run(ids, args.tokens) - run(ids, 1))
                found.setdefault((f"decode, batch {batch}", name), []).append(rate)
        for name, run in engines.items():
            rate = 512 / run(prompts(1, 512), 1)
            found.setdefault(("prefill, 512 tokens", name), []).append(rate)
    rows = []
    for case in dict.fromkeys(case for case, _ in found):
        ours, theirs = found[case, "ours"], found[case, "theirs"]
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        rows.append([case, f"{median(ours):.1f}", f"{median(theirs):.1f}",
                     f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"])
    weight_bytes = llm.artifact.manifest["memory"]["weight_bytes"]
    used = median(found["decode, batch 1", "ours"]) * weight_bytes
    limit = read_bandwidth()
    body = table(["case", "xllm tok/s", "transformers tok/s", "ratio, median (min-max)"], rows)
    body += (f"\n\nBatch-1 decode reads {used / 1e9:.1f} GB/s of weights "
             f"({weight_bytes / 1e9:.2f} GB a step), {used / limit:.0%} of the measured "
             f"{limit / 1e9:.1f} GB/s.")
    publish("decode", "Decode and prefill against transformers", body)


if __name__ == "__main__":
    main()
