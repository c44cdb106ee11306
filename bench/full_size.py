"""Full-size models through capture and every pass, without weights: seconds, nodes, memory."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import transformers as hf

from common import publish, table
from xllm.compiler.capture import capture, capture_encoder
from xllm.compiler.manifest import kv_bytes_per_page
from xllm.compiler.pipeline import ENCODE_PIPELINE, PIPELINE
from xllm.compiler.runner import run_pipeline
from xllm.passes.core import PassContext
from xllm.targets import find
from xllm.vision import sees_images

PAGE = 16
_YARN = {"rope_type": "yarn", "rope_theta": 50000.0, "factor": 32.0, "beta_fast": 1.0,
         "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
         "original_max_position_embeddings": 4096}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
           "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}

#: The published shapes.
MODELS: dict[str, Callable[[], hf.PretrainedConfig]] = {
    "DeepSeek-V3 671B": lambda: hf.DeepseekV3Config(tie_word_embeddings=False),
    "Kimi-K2 1T": lambda: hf.DeepseekV3Config(
        vocab_size=163840, num_attention_heads=64, num_key_value_heads=64, n_routed_experts=384,
        n_group=1, topk_group=1, first_k_dense_replace=1, routed_scaling_factor=2.827,
        max_position_embeddings=131072, rope_parameters=_YARN, tie_word_embeddings=False),
    "Qwen3-235B-A22B": lambda: hf.Qwen3MoeConfig(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=94,
        num_attention_heads=64, num_key_value_heads=4, head_dim=128, num_experts=128,
        num_experts_per_tok=8, moe_intermediate_size=1536, norm_topk_prob=True,
        max_position_embeddings=40960, tie_word_embeddings=False),
    "Llama-3.1-405B": lambda: hf.LlamaConfig(
        vocab_size=128256, hidden_size=16384, intermediate_size=53248, num_hidden_layers=126,
        num_attention_heads=128, num_key_value_heads=8, max_position_embeddings=131072,
        rope_parameters=_LLAMA3, tie_word_embeddings=False),
    "Qwen2.5-VL-72B": lambda: hf.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 152064, "hidden_size": 8192, "intermediate_size": 29568,
            "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
            "max_position_embeddings": 128000, "rope_parameters": _MROPE},
        vision_config={"depth": 32, "hidden_size": 1280, "out_hidden_size": 8192,
                       "intermediate_size": 3456, "num_heads": 16},
        tie_word_embeddings=False),
}


def measure(name: str) -> list[dict[str, object]]:
    """One row per graph of the model; the process's peak memory is in each."""
    config = MODELS[name]()
    graphs = [("text", capture, PIPELINE)]
    if sees_images(config):
        graphs.append(("encode", capture_encoder, ENCODE_PIPELINE))
    rows = []
    for graph, take, pipeline in graphs:
        start = time.perf_counter()
        program, facts = take(config, torch.bfloat16)
        captured = time.perf_counter()
        ctx = PassContext(facts, find("cpu"), torch.bfloat16, PAGE, program.inputs)
        records = run_pipeline(program, ctx, pipeline)
        rows.append({
            "model": name if graph == "text" else f"{name} ({graph})",
            "capture, s": round(captured - start, 1),
            "passes, s": round(time.perf_counter() - captured, 1),
            "nodes captured": records[0].nodes, "nodes at the end": records[-1].nodes,
            "pieces": ", ".join(f"{piece} x {program.calls(piece)}" for piece in program.pieces),
            "KV bytes per token": kv_bytes_per_page(program, PAGE) // PAGE,
            "peak memory, MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10})
    return rows


def main() -> None:
    """Measure each model in a process of its own, and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--child", choices=list(MODELS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child)))
        return
    rows = []
    for name in args.models:
        done = subprocess.run([sys.executable, __file__, "--child", name], check=True,
                              capture_output=True, text=True)
        rows += json.loads(done.stdout.splitlines()[-1])
    body = table(list(rows[0]), [list(row.values()) for row in rows])
    body += ("\n\nbfloat16, target cpu, one process per model on the meta device; importing torch "
             "and transformers is not counted. A pass that fires less often than the configuration "
             "says it must would have ended the run.")
    publish("full_size", "Full-size models through capture and every pass, without weights", body)


if __name__ == "__main__":
    main()
