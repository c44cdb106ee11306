"""Whole graphs: every pass keeps a model's values, in both dtypes, against the eager oracle."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.testing import FileCheck

from tests.tiny import CASES, FAMILIES, OTHER_CASES, captured, case_id, stages
from xllm.compiler.pipeline import PIPELINE
from xllm.compiler.verify import TOLERANCE, Checker, numerics
from xllm.levels import LEVELS

BY_MODEL = pytest.mark.parametrize(("family", "dtype"), CASES, ids=case_id)


def check_passes(family: str, dtype: torch.dtype, seed: int) -> None:
    """Weights, tokens and the ragged batch are drawn; each pass within what it declares."""
    found, _, ctx = stages(family, dtype)
    check = Checker(captured(family, dtype)[0], draws=1, seed=seed)
    for stage in found:
        check(stage.before, stage.after, ctx, stage.item)


@BY_MODEL
@settings(max_examples=2, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(seed=st.integers(0, 10**6))
def test_each_pass_keeps_the_values(family: str, dtype: torch.dtype, seed: int) -> None:
    check_passes(family, dtype, seed)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "dtype"), CASES + OTHER_CASES, ids=case_id)
@settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(seed=st.integers(0, 10**9))
def test_each_pass_keeps_the_values_often(family: str, dtype: torch.dtype, seed: int) -> None:
    check_passes(family, dtype, seed)


@BY_MODEL
def test_the_whole_pipeline_keeps_the_values(family: str, dtype: torch.dtype) -> None:
    """Captured against lowered, from an empty cache."""
    found, _, ctx = stages(family, dtype)
    program = captured(family, dtype)[0]
    last = next(item for item in PIPELINE if numerics(item) == "changes rounding")
    Checker(program, draws=3, seed=5)(program, found[-1].after, ctx, last)


def test_levels_follow_each_other() -> None:
    places = [(LEVELS.index(item.before), LEVELS.index(item.after)) for item in PIPELINE]
    level = 0
    for before, after in places:
        assert before == level or after == level
        assert after >= level
        level = after
    assert LEVELS[level] == "lowered"
    assert {numerics(item) for item in PIPELINE} <= TOLERANCE.keys()


def text_after(family: str, dtype: torch.dtype, name: str) -> dict[str, str]:
    """Listing of each piece behind the last run of a pass."""
    _, records, _ = stages(family, dtype)
    record = [r for r in records if r.name == name][-1]
    return {piece: "\n".join(line for line, _ in lines) for piece, lines in record.snapshot.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_recognised_graph(family: str) -> None:
    """Nothing of the spelled-out formulas is left at the canonical level."""
    text = text_after(family, torch.bfloat16, "select_logits_rows")["model"]
    check = FileCheck().check("aten.embedding")
    check.check("xllm.rms_norm").check_not("aten.rsqrt").check("aten.linear")
    check.check("xllm.rope").check_not("aten.neg").check("xllm.attention")
    check.check("xllm.silu_mul").check("aten.index_select").check("return").run(text)
    for spelled in ("aten.rsqrt", "aten.silu", "aten.neg", "aten.pow", "_assert", "aten.alias"):
        assert spelled not in text


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_layer(family: str) -> None:
    """A decoder layer is four linears, two fused norms, the fused write and attention."""
    pieces = text_after(family, torch.bfloat16, "pack_linear")
    layers = [text for name, text in pieces.items() if name.startswith("layer")]
    assert len(layers) == (2 if family == "qwen2-window" else 1)
    for text in layers:
        check = FileCheck().check_not("xllm.rms_norm").check_not("xllm.kv_write")
        check.check("xllm.packed_linear").check("xllm.qk_norm_rope_kv_write")
        check.check("xllm.paged_attention").check("xllm.packed_linear")
        check.check("xllm.add_rms_norm").check("xllm.packed_linear").check("xllm.silu_mul")
        check.check("xllm.packed_linear").check("xllm.add_rms_norm").run(text)
        assert len(re.findall(r"= xllm\.packed_linear", text)) == 4
        assert "aten.add" not in text and "aten.linear" not in text


def test_window_reaches_only_its_layers() -> None:
    pieces = text_after("qwen2-window", torch.bfloat16, "lower")
    windows = {name: re.search(r"%seq_lens, [\d.e-]+(?:, (None|\d+))?", text).group(1)
               for name, text in pieces.items() if name.startswith("layer")}
    assert windows == {"layer_0": None, "layer_1": "3"}


def test_tied_head_and_embedding_share_one_packed_weight() -> None:
    pieces = text_after("qwen3", torch.bfloat16, "lower")
    recipe = "Weight(recipe=Pack(part=Leaf(name='model.embed_tokens.weight')))"
    assert recipe in pieces["prologue"] and recipe in pieces["epilogue"]
    untied = text_after("llama", torch.bfloat16, "lower")
    assert "Weight(recipe=Leaf(name='model.embed_tokens.weight'))" in untied["prologue"]
    assert "Pack(part=Leaf(name='lm_head.weight'))" in untied["epilogue"]
