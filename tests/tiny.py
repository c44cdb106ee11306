"""Tiny random models of every supported family: configurations, programs, checkpoints."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from tests.zoo import SIZES, ZOO
from xllm.compiler.capture import capture
from xllm.compiler.pipeline import PIPELINE
from xllm.compiler.runner import PassRecord, run_pipeline
from xllm.graph import Program, copy_program
from xllm.passes.core import ModelFacts, Pass, PassContext
from xllm.targets import find

PAGE_SIZE = 4
DTYPES = (torch.float32, torch.bfloat16)

_LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
           "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
         "original_max_position_embeddings": 128}


def families() -> dict[str, PretrainedConfig]:
    """A fresh configuration per supported family and per variant that changes the graph."""
    return {
        "llama": LlamaConfig(tie_word_embeddings=False, **SIZES),
        "llama-llama3": LlamaConfig(rope_parameters=_LLAMA3, tie_word_embeddings=True, **SIZES),
        "qwen2": Qwen2Config(tie_word_embeddings=False, **SIZES),
        "qwen2-window": Qwen2Config(use_sliding_window=True, sliding_window=3, max_window_layers=1,
                                    tie_word_embeddings=True, **SIZES),
        "qwen3": Qwen3Config(head_dim=16, tie_word_embeddings=True, **SIZES),
        "qwen3-yarn": Qwen3Config(head_dim=16, rope_parameters=_YARN, tie_word_embeddings=False,
                                  **SIZES),
    }


FAMILIES = tuple(families())
#: (family, dtype) of the default whole-graph tests; the variants in float32 are slow tests.
CASES = tuple((family, dtype) for family in FAMILIES for dtype in DTYPES
              if dtype == torch.bfloat16 or "-" not in family)
OTHER_CASES = tuple((family, dtype) for family in FAMILIES for dtype in DTYPES
                    if (family, dtype) not in CASES)
ZOO_CASES = tuple((family, torch.bfloat16) for family in ZOO)


def config_of(family: str) -> PretrainedConfig:
    """The configuration of a family that is tested through and through, or of the zoo."""
    return ZOO[family]() if family in ZOO else families()[family]


def case_id(value: object) -> str:
    """Name of a family or dtype in a test's id."""
    return str(value).removeprefix("torch.")


@functools.cache
def _captured(family: str, dtype: torch.dtype) -> tuple[Program, ModelFacts]:
    return capture(config_of(family), dtype)


def captured(family: str, dtype: torch.dtype) -> tuple[Program, PassContext]:
    """The captured program, free to edit (captured once per session), and its pass context."""
    program, facts = _captured(family, dtype)
    return copy_program(program), PassContext(facts, find("cpu"), dtype, PAGE_SIZE, program.inputs)


@dataclass(frozen=True)
class Stage:
    """One pass that fired: the program before it and after it. Copy before editing."""

    item: Pass
    before: Program
    after: Program


@functools.cache
def stages(family: str, dtype: torch.dtype) -> tuple[list[Stage], list[PassRecord], PassContext]:
    """The pipeline over a tiny model, run once per session."""
    program, ctx = captured(family, dtype)
    found: list[Stage] = []

    def keep(before: Program, after: Program, ctx: PassContext, item: Pass) -> float:
        found.append(Stage(item, before, copy_program(after)))
        return 0.0

    return found, run_pipeline(program, ctx, PIPELINE, keep), ctx


def save_checkpoint(config: PretrainedConfig, directory: Path, dtype: torch.dtype = torch.float32,
                    seed: int = 0) -> Path:
    """Write config.json and model.safetensors of a random model; returns ``directory``.

    No tokenizer.
    """
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    randomise(model, seed)
    model.save_pretrained(directory)
    return directory


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Draw all parameters; norm weights and biases too, so that mixing up two of them shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(".bias"):
                value = noise / 2
            elif parameter.dim() == 1:
                value = 1 + noise / 10
            else:
                value = noise * 2 / parameter.shape[-1] ** 0.5
            parameter.copy_(value)
