"""The table of weight classes: names without layers, stored and held formats, bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from tests.quantized import STYLES
from tests.test_quantized_layouts import infos
from tests.tiny import stages
from xllm.checkpoint import TensorInfo
from xllm.compiler.manifest import weight_bytes
from xllm.compiler.runner import clean
from xllm.compiler.weight_classes import weight_classes
from xllm.graph import Program, copy_program
from xllm.passes.keep_quantized import keep_quantized
from xllm.quantization import format_of
from xllm.quantized_layouts import expand
from xllm.weights import Leaf, Recipe


def last(family: str, name: str) -> tuple[Program, dict[str, Recipe], dict[str, TensorInfo]]:
    """The program before a pass, and plain sources for its parameters."""
    found, _, ctx = stages(family, torch.bfloat16)
    program = next(stage.before for stage in found if stage.item.name == name)
    names = {name for call in program.schedule for name in call.leaves.values()}
    tensors = {name: TensorInfo(Path(), (), "BF16") for name in names}
    return program, {name: Leaf(name) for name in names}, tensors


def test_plain_weights() -> None:
    program, recipes, tensors = last("qwen3", "lower")
    rows = {row["class"]: row for row in weight_classes(program, recipes, tensors)}
    merged = "self_attn.q_proj + self_attn.k_proj + self_attn.v_proj"
    assert {merged, "mlp.gate_proj + mlp.up_proj", "embed_tokens", "norm"} <= rows.keys()
    assert {(row["stored"], row["memory"]) for row in rows.values()} == {("BF16", "bfloat16")}
    assert sum(row["bytes"] for row in rows.values()) == weight_bytes(program)
    assert rows["self_attn.o_proj"]["bytes"] == 2 * 2 * 32 * 64  # layers, bytes, rows, inputs


def test_quantised_weights() -> None:
    """Codes, scales and zero points of a class are one row; what is not kept says so."""
    program, recipes, tensors = last("qwen3", "pack_linear")
    for part, style, shape in (("down_proj", "awq", (32, 48)),
                               ("o_proj", "gptq-act-order", (32, 64))):
        for name in [n for n in recipes if part in n]:
            stored, _ = STYLES[style].encode(torch.randn(shape))
            module = name.removesuffix("weight")
            known = infos({module + key: tensor for key, tensor in stored.items()})
            recipes |= expand(known, STYLES[style].config)[1]
    known = {name: format for name, recipe in recipes.items() if (format := format_of(recipe))}
    ctx = replace(stages("qwen3", torch.bfloat16)[2], quantized=known)
    program = copy_program(program)
    assert keep_quantized(program, ctx) == 2
    clean(program)
    rows = {row["class"]: row for row in weight_classes(program, recipes, tensors)}
    groups = 3  # of 16 inputs
    assert rows["mlp.down_proj"] == {
        "class": "mlp.down_proj", "stored": STYLES["awq"].format, "memory": "int4",
        "bytes": 2 * (32 * 48 // 2 + 32 * groups * (4 + 1))}
    assert rows["self_attn.o_proj"]["stored"] == "int4, inputs out of order"
    assert rows["self_attn.o_proj"]["memory"] == "bfloat16"
