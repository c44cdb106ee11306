"""Capture of models that see images: two graphs, equal to the model's own code."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    PretrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from tests.compiler.test_capture import Loaded
from tests.tiny import DTYPES, PAGE_SIZE, case_id
from tests.vision_tiny import LARGE, SMALL, Picture, config, inputs_of, save
from xllm.compiler.capture import CaptureError, capture, capture_encoder
from xllm.compiler.pipeline import ENCODE_PIPELINE, PIPELINE
from xllm.compiler.runner import PassRecord, run_pipeline, symbol_names
from xllm.compiler.verify import Checker, Oracle
from xllm.graph import ENCODE_DIMS, IMAGE_DIMS, INPUT_DIMS, Program, calls_of, placeholders
from xllm.passes.core import PassContext
from xllm.targets import find
from xllm.vision import encode_inputs

GRAPHS = {"text": (capture, PIPELINE), "encode": (capture_encoder, ENCODE_PIPELINE)}
BY_GRAPH = pytest.mark.parametrize("graph", GRAPHS)
BY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
FIRES = {
    "text": {
        "recognise_rms_norm": 5, "recognise_rope": 4, "recognise_silu_mul": 2,
        "select_logits_rows": 1, "roll_layers": 2, "page_attention": 2, "merge_projections": 4,
        "fuse_add_rms_norm": 4, "fuse_qk_norm_rope_kv_write": 2, "pack_linear": 9},
    "encode": {
        "recognise_rms_norm": 7, "recognise_silu_mul": 3, "roll_layers": 3,
        "merge_projections": 3, "fuse_add_rms_norm": 6, "pack_linear": 14},
}


@functools.cache
def lowered(graph: str, dtype: torch.dtype) -> tuple[Program, PassContext, list[PassRecord]]:
    """A graph after all passes, each verified on values."""
    make, table = GRAPHS[graph]
    program, facts = make(config(), dtype)
    ctx = PassContext(facts, find("cpu"), dtype, PAGE_SIZE, program.inputs)
    return program, ctx, run_pipeline(program, ctx, table, Checker(program))


@BY_GRAPH
@BY_DTYPE
def test_fires(graph: str, dtype: torch.dtype) -> None:
    """As often as it must, and no pass changes the values."""
    fired = {r.name: r.sites for r in lowered(graph, dtype)[2]}
    packed = {} if dtype == torch.bfloat16 else {"pack_linear": 0}
    assert fired | FIRES[graph] | packed == fired


@BY_GRAPH
def test_inputs_and_symbols(graph: str) -> None:
    program = lowered(graph, torch.bfloat16)[0]
    dims = INPUT_DIMS | {"pages": ("P",)} | IMAGE_DIMS if graph == "text" else ENCODE_DIMS
    assert program.inputs.keys() == dims.keys()
    names = {"text": "TSMRPI", "encode": "UBW"}[graph]
    assert sorted(symbol_names(program).values()) == sorted(names)
    read = {n.meta["bind"].name for gm in program.pieces.values() for n in placeholders(gm)
            if hasattr(n.meta["bind"], "name")}
    unread = {"positions", "pages"} if graph == "text" else set()  # rotary positions instead
    assert dims.keys() - read == unread


def test_layers_with_windows_are_one_piece_and_full_attention_another() -> None:
    program = lowered("encode", torch.float32)[0]
    order = [call.piece for call in program.schedule]
    assert order == ["prologue", "layer_0", "layer_1", "layer_0", "epilogue"]
    for piece, bounds in (("layer_0", "cu_window_seqlens"), ("layer_1", "cu_seqlens")):
        (node,) = calls_of(program.pieces[piece], torch.ops.xllm.segment_attention.default)
        assert node.args[3].name == bounds


class Tower(Loaded):
    """An oracle on a checkpoint's weights, by the names they have in the model."""

    def __init__(self, program: Program, directory: Path) -> None:
        Oracle.__init__(self, program)
        self.tensors = {name.replace("visual.", "model.visual.", 1): tensor for name, tensor in
                        load_file(directory / "model.safetensors").items()}


def encoded(model: Qwen2_5_VLForConditionalGeneration, pictures: list[Picture]) -> Tensor:
    """Image embeddings by ``transformers``."""
    grids = torch.cat([p.grids for p in pictures])
    with torch.no_grad():
        return model.model.visual(torch.cat([p.pixels for p in pictures]), grids).pooler_output


def test_encode_graph_is_the_tower_for_any_images(tmp_path: Path) -> None:
    """One token, one window, cut windows, several images at once: before and after the passes."""
    save(tmp_path)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    before = capture_encoder(config(), torch.float32)[0]
    runs = [Tower(before, tmp_path).load(p) for p in (before, lowered("encode", torch.float32)[0])]
    groups = ([(1, 2, 2)], [SMALL], [LARGE], [LARGE, SMALL, (1, 2, 8), SMALL])
    for grids in groups:
        pictures = [Picture(grid, seed) for seed, grid in enumerate(grids)]
        inputs = {"pixel_values": torch.cat([p.pixels for p in pictures])} | encode_inputs(
            config(), torch.tensor(grids))
        for run in runs:
            torch.testing.assert_close(run(inputs, 0), encoded(model, pictures),
                                       rtol=1e-4, atol=1e-5)


def test_verification_sees_a_wrong_window(tmp_path: Path) -> None:
    """What the encode graph computes depends on every input."""
    program = lowered("encode", torch.float32)[0]
    run = Oracle(capture_encoder(config(), torch.float32)[0]).load(program)
    inputs = inputs_of(Picture(LARGE, 0))
    want = run(inputs, 0)
    whole = torch.tensor([0, 60], dtype=torch.int32)
    for name, other in (("cu_window_seqlens", whole), ("position_ids", inputs["position_ids"] * 2),
                        ("cu_seqlens", torch.tensor([0, 20, 60], dtype=torch.int32)),
                        ("pixel_values", inputs["pixel_values"] + 1),
                        ("window_index", inputs["window_index"].flip(0))):
        assert not torch.allclose(run(inputs | {name: other}, 0), want), name


def test_image_rows_replace_embeddings() -> None:
    """Only where a row is named; embeddings that no token names have no influence."""
    program, ctx, _ = lowered("text", torch.float32)
    run = Oracle(capture(config(), torch.float32)[0]).load(program)
    count, embeds = 6, torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    batch = {
        "positions": torch.arange(count), "slot_mapping": 4 + torch.arange(count),
        "block_table": torch.tensor([[1, 2]], dtype=torch.int32),
        "query_start_loc": torch.tensor([0, count], dtype=torch.int32),
        "seq_lens": torch.tensor([count], dtype=torch.int32), "num_pages": torch.tensor(3),
        "mrope_positions": torch.arange(count).expand(3, 1, -1), "image_embeds": embeds,
        "image_rows": torch.tensor([-1, 2, 1, -1, -1, -1])}
    want = run(batch, ctx.facts.vocab_size)
    unnamed, named = embeds.clone(), embeds.clone()
    unnamed[0] += 1
    named[2] += 1
    assert torch.equal(run(batch | {"image_embeds": unnamed}, 96), want)
    changed = run(batch | {"image_embeds": named}, 96) != want
    assert not changed[0].any() and changed[1:].any(1).all()


def real() -> Qwen2_5_VLConfig:
    """Qwen2.5-VL-72B."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    return Qwen2_5_VLConfig(text_config={"rope_parameters": rope},
                            vision_config={"hidden_size": 1280, "intermediate_size": 3456,
                                           "out_hidden_size": 8192})


@pytest.mark.slow
@BY_GRAPH
def test_72b(graph: str) -> None:
    program, facts = GRAPHS[graph][0](real(), torch.bfloat16)
    ctx = PassContext(facts, find("cpu"), torch.bfloat16, 16, program.inputs)
    run_pipeline(program, ctx, GRAPHS[graph][1])
    calls = {"text": {"prologue": 1, "layer": 80, "epilogue": 1},
             "encode": {"prologue": 1, "layer_0": 28, "layer_1": 4, "epilogue": 1}}
    assert {piece: program.calls(piece) for piece in program.pieces} == calls[graph]


def minicpm(kind: str) -> PretrainedConfig:
    """MiniCPM-V with one layer; its layers have linear attention, but for every fourth."""
    text = {"model_type": "qwen3_5_text", "num_hidden_layers": 1, "hidden_size": 32,
            "intermediate_size": 48, "vocab_size": 96, "layer_types": ["linear_attention"]}
    return AutoConfig.for_model(kind, text_config=text)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["minicpmv4_6", "minicpmv4_7"])
def test_linear_attention_is_named(kind: str) -> None:
    with pytest.raises(CaptureError, match=r"module model\.language_model\.layers\.0\.linear_attn "
                                           r"\(Qwen3_5GatedDeltaNet\) cannot be captured"):
        capture(minicpm(kind), torch.float32)


def test_another_vision_tower_is_refused() -> None:
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 96,
            "num_attention_heads": 4, "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
    other = AutoConfig.for_model("qwen2_vl", text_config=text)
    with pytest.raises(CaptureError, match="vision part of model_type 'qwen2_vl' is not supported; "
                                           "model types whose is: qwen2_5_vl"):
        capture(other, torch.float32)
