"""absorb_mla on the families that have latent attention; its rule alone is in the rule table."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    Glm4MoeLiteConfig,
    MiniCPM3Config,
    PretrainedConfig,
    YoutuConfig,
)

from tests.passes.pass_graphs import (
    T,
    aten,
    build,
    clean,
    context,
    execute,
    fake,
    targets,
    xllm,
)
from xllm.compiler.capture import capture
from xllm.compiler.pipeline import PIPELINE
from xllm.compiler.runner import run_pipeline
from xllm.compiler.verify import Checker
from xllm.graph import State, copy_program, placeholders
from xllm.passes.absorb_mla import absorb_mla, expanded
from xllm.passes.core import PassContext
from xllm.targets import find

HEADS, NOPE, TURNED, RANK, VALUE = 4, 8, 4, 16, 6
_SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "kv_lora_rank": RANK,
    "qk_nope_head_dim": NOPE, "qk_rope_head_dim": TURNED, "v_head_dim": VALUE,
}
_MOE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "n_shared_experts": 1, "first_k_dense_replace": 2, "n_group": 2, "topk_group": 1}


def families() -> dict[str, PretrainedConfig]:
    """Dense layers only: the experts are other passes' business."""
    return {
        "deepseek_v2": DeepseekV2Config(q_lora_rank=16, **_SIZES, **_MOE),
        "deepseek_v3": DeepseekV3Config(q_lora_rank=16, **_SIZES, **_MOE),
        "deepseek_v3-halves": DeepseekV3Config(q_lora_rank=None, rope_interleave=False, **_SIZES,
                                               **_MOE),
        "minicpm3": MiniCPM3Config(q_lora_rank=16, **_SIZES),
        "glm4_moe_lite": Glm4MoeLiteConfig(q_lora_rank=16, **_SIZES, **_MOE),
        "youtu": YoutuConfig(q_lora_rank=16, **_SIZES),
    }


@pytest.mark.parametrize("family", families())
def test_families(family: str) -> None:
    """Every layer is found, values stay to the bit, and the cache holds a latent per token."""
    program, facts = capture(families()[family], torch.float32)
    ctx = PassContext(facts, find("cpu"), torch.float32, 4, program.inputs)
    until = [item.name for item in PIPELINE].index("page_attention") + 1
    records = run_pipeline(program, ctx, PIPELINE[:until], Checker(copy_program(program)))
    by_name = {record.name: record for record in records}
    assert by_name["absorb_mla"].sites == facts.num_latent_attentions == 2
    assert by_name["absorb_mla"].error == 0.0
    caches = [n for gm in program.pieces.values() for n in placeholders(gm, State)]
    assert {tuple(n.meta["val"].shape[1:]) for n in caches} == {(4, RANK + TURNED)}


def arguments(dtype: torch.dtype = torch.float32) -> dict[str, object]:
    """One site with a value size of its own."""
    return {
        "q": fake((1, T, HEADS, NOPE + TURNED), dtype), "k_rope": fake((1, 1, T, TURNED), dtype),
        "latent": fake((1, 1, T, RANK), dtype),
        "weight": fake((HEADS * (NOPE + VALUE), RANK), dtype), "heads": HEADS,
        "both": NOPE + VALUE, "nope": NOPE, "value": VALUE, "tokens": T, "key": NOPE + TURNED,
        "scale": 0.3,
    }


def test_nothing_of_the_expansion_is_left() -> None:
    gm = build(expanded, arguments())
    assert absorb_mla(gm, context()) == 1
    assert set(targets(clean(gm))) == {
        aten.slice.Tensor, aten.squeeze.dim, xllm.latent_attention.default}


@pytest.mark.parametrize("options", [(5,), (None, 20.0)], ids=["window", "soft cap"])
def test_miss_where_the_op_has_no_such_option(options: tuple) -> None:
    gm = build(expanded, arguments())
    node = next(n for n in gm.graph.nodes if n.target is xllm.attention.default)
    node.args = (*node.args, *options)
    assert absorb_mla(gm, context()) == 0


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), tokens=st.integers(1, 9),
       dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_values(seed: int, tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    fakes = arguments(dtype)
    values = {
        name: torch.randn([tokens if d == T else d for d in v.shape], generator=generator).to(dtype)
        for name, v in fakes.items() if isinstance(v, Tensor)}
    gm = build(expanded, fakes)
    want = execute(gm, values)
    assert absorb_mla(gm, context(dtype)) == 1
    for got, expected in zip(execute(clean(gm), values), want, strict=True):
        assert torch.equal(got, expected)
