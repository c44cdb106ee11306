"""How fast is a block of experts, next to transformers' loop over experts and its grouped product?

    python bench/group_matmul.py

One layer of Qwen3-30B-A3B (hidden 2048, 128 experts of width 768, 8 per token) in bfloat16: from
routed tokens to their weighted sum, the router left out. The three take turns, so that a neighbour
on the machine slows all; ratios are medians over rounds. "GB/s" counts the weights of the experts
that were hit, once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.integrations.moe import grouped_mm_experts_forward
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import common
from xllm.compiler.build import kernel_library
from xllm.ops.linear import pack
from xllm.progress import Reporter

HIDDEN, EXPERTS, TOP_K, WIDTH = 2048, 128, 8, 768
xllm = torch.ops.xllm


def experts_module() -> Qwen3MoeExperts:
    """transformers' module with random weights."""
    config = Qwen3MoeConfig(hidden_size=HIDDEN, num_experts=EXPERTS, num_experts_per_tok=TOP_K,
                            moe_intermediate_size=WIDTH)
    config._experts_implementation = "eager"
    module = Qwen3MoeExperts(config).bfloat16()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return module


def ours(gate_up: Tensor, down: Tensor, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """What group_experts and pack_experts make of the block."""
    rows, places, offsets = xllm.group_tokens(ids, EXPERTS)
    both = xllm.packed_group_matmul(x, gate_up, None, offsets, rows, 2 * WIDTH)
    hidden = xllm.gated_activation(both, "silu")
    y = xllm.packed_group_matmul(hidden, down, None, offsets, None, HIDDEN)
    return xllm.combine_experts(y, places, weights)


def route(tokens: int, zipf: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Weights and ids ``[N, K]``: experts drawn evenly, or with probability 1 / rank."""
    shares = 1 / torch.arange(1, EXPERTS + 1) if zipf else torch.ones(EXPERTS)
    ids = torch.multinomial(shares.expand(tokens, -1), TOP_K, generator=generator)
    weights = torch.rand(tokens, TOP_K, generator=generator).softmax(-1)
    return weights.bfloat16(), ids


def compare(runs: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each in each round; they take turns, in turns of order."""
    results = {name: run() for name, run in runs.items()}
    for name, result in results.items():
        error = (result.float() - results["ours"].float()).abs().max()
        assert error < 0.05, f"{name} differs from ours by {error}"
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        for name in sorted(runs, reverse=bool(turn % 2)):
            times[name].append(common.seconds(runs[name]))
    return times


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    torch.ops.load_library(kernel_library(Reporter()))
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    module = experts_module()
    packed = [pack(w.detach()) for w in (module.gate_up_proj, module.down_proj)]
    expert_bytes = 2 * 3 * HIDDEN * WIDTH
    rows = []
    for tokens in (1, 16, 256, 2048):
        for zipf in (False, True):
            x = torch.randn(tokens, HIDDEN, generator=generator).bfloat16()
            weights, ids = route(tokens, zipf, generator)
            hit = len(ids.unique())
            with torch.no_grad():
                times = compare({
                    "ours": lambda: ours(*packed, x, ids, weights),
                    "loop": lambda: module(x, ids, weights),
                    "grouped": lambda: grouped_mm_experts_forward(module, x, ids, weights),
                }, rounds)
            best = common.median(times["ours"])
            ratios = [f"{common.median([t / o for t, o in zip(times[n], times['ours'])]):.2f}"
                      for n in ("loop", "grouped")]
            rows.append([tokens, "Zipf" if zipf else "even", hit, f"{hit * expert_bytes / 1e6:.0f}",
                         f"{best * 1e3:.2f}", *ratios, f"{hit * expert_bytes / best / 1e9:.1f}"])
    header = ["tokens", "routing", "experts hit", "MB of them", "ms", "loop / ours",
              "grouped_mm / ours", "GB/s"]
    limit = f"Read bandwidth in the same run: {common.read_bandwidth() / 1e9:.1f} GB/s."
    common.publish("group_matmul", "A block of experts", f"{common.table(header, rows)}\n\n{limit}")


if __name__ == "__main__":
    main()
