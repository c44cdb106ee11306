"""Capture: transformers models become graphs without weights, for every token count."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from tests.tiny import CASES, FAMILIES, captured, case_id, families, save_checkpoint
from tests.zoo import SIZES
from xllm.compiler.capture import CaptureError, capture
from xllm.compiler.verify import Oracle
from xllm.graph import INPUT_DIMS, Constant, Weight, placeholders
from xllm.levels import verify
from xllm.targets import find


class Loaded(Oracle):
    """An oracle on the weights of a checkpoint, and on given tokens."""

    def __init__(self, program: object, directory: Path) -> None:
        super().__init__(program)
        self.tensors = load_file(directory / "model.safetensors")

    def leaf(self, name: str) -> Tensor:
        """The checkpoint's tensor."""
        return self.tensors[name]


def tokens_of(count: int) -> Tensor:
    """The tokens that the oracle draws at seed 0."""
    return torch.randint(96, (1, count), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_graph_is_the_model_for_any_token_count(family: str, tmp_path: Path) -> None:
    """Captured graph against transformers' own eager forward."""
    save_checkpoint(families()[family], tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32,
                                                 attn_implementation="eager").eval()
    program = captured(family, torch.float32)[0]
    run = Loaded(program, tmp_path).load(program)
    for count in (1, 2, 17):
        logits = run({"positions": torch.arange(count)}, 96)
        with torch.no_grad():
            want = model(tokens_of(count)).logits[0].float()
        torch.testing.assert_close(logits, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "dtype"), CASES, ids=case_id)
def test_no_weights_are_read(family: str, dtype: torch.dtype) -> None:
    """All parameters are on meta; what is real is small and not in the checkpoint."""
    program, ctx = captured(family, dtype)
    (gm,) = program.pieces.values()
    assert all(node.meta["val"].is_meta for node in placeholders(gm))
    assert {node.meta["bind"].name for node in placeholders(gm, Constant)} == set(
        program.constants)
    for tensor in program.constants.values():
        assert not tensor.is_meta and tensor.dtype == torch.float32 and tensor.numel() < 100
    verify(program, "captured", find("cpu").kernels)
    assert set(program.inputs) == {*INPUT_DIMS, "pages"}


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_checkpoint(family: str, tmp_path: Path) -> None:
    save_checkpoint(families()[family], tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    program = captured(family, torch.bfloat16)[0]
    (gm,) = program.pieces.values()
    shapes = {n.meta["bind"].recipe.name: tuple(n.meta["val"].shape)
              for n in placeholders(gm, Weight)}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in stored.items()}
    assert program.schedule[0].leaves == {name: name for name in shapes}


def test_token_count_is_one_symbol() -> None:
    program, _ = captured("qwen3", torch.bfloat16)
    sizes = {str(program.inputs[n].shape[-1]) for n in ("input_ids", "positions", "slot_mapping")}
    assert len(sizes) == 1
    (gm,) = program.pieces.values()
    logits = gm.graph.find_nodes(op="output")[0].args[0][0].meta["val"]
    assert str(logits.shape[1]) in sizes and logits.shape[2] == 96


def test_facts() -> None:
    for family, norms in (("llama", 5), ("qwen2-window", 5), ("qwen3", 9)):
        facts = captured(family, torch.bfloat16)[1].facts
        assert (facts.num_layers, len(facts.norms), facts.num_residual_norms) == (2, norms, 4)
        assert (facts.num_fused_qkv, facts.num_rotations, facts.num_gated_mlps) == (2, 4, 2)
        assert (facts.num_even_linears, facts.num_linear_groups) == (15, 4)
        assert facts.num_grouped_linears == 10
        assert (facts.hidden_size, facts.vocab_size, facts.context_length) == (32, 96, 512)
        assert facts.tied_embeddings == families()[family].tie_word_embeddings


@pytest.mark.parametrize(("family", "norms", "residual", "gated", "moe", "latent", "fused"), [
    ("deepseek_v3", 13, 6, 3, 2, 3, 0), ("gemma3", 19, 6, 0, 0, 0, 0), ("olmo2", 9, 1, 2, 0, 0, 0),
    ("cohere2", 3, None, 2, 0, 0, 0), ("gpt_oss", 5, 4, 0, 2, 0, 0), ("glm4", 9, 4, 2, 0, 0, 0),
])
def test_facts_of_other_layouts(family: str, norms: int, residual: int | None, gated: int,
                                moe: int, latent: int, fused: int) -> None:
    facts = captured(family, torch.bfloat16)[1].facts
    assert (len(facts.norms), facts.num_residual_norms) == (norms, residual)
    assert (facts.num_gated_mlps, facts.num_moe_layers) == (gated, moe)
    assert (facts.num_latent_attentions, facts.num_fused_qkv) == (latent, fused)


def test_what_transformers_does_not_know_is_refused() -> None:
    with pytest.raises(CaptureError, match="model_type '' is no causal language model"):
        capture(PretrainedConfig(), torch.float32)


@pytest.mark.parametrize(("config", "module"), [
    (hf.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2),
     r"backbone\.layers\.0\.mixer \(MambaMixer\)"),
    pytest.param(hf.Qwen3NextConfig(**SIZES),
                 r"model\.layers\.0\.linear_attn \(Qwen3NextGatedDeltaNet\)",
                 marks=pytest.mark.slow),
    (hf.DeepseekV32Config(**SIZES), r"model\.layers\.0\.self_attn \(DeepseekV32Attention\)"),
], ids=["mamba", "qwen3_next", "deepseek_v32"])
def test_an_unsupported_module_is_named_in_one_line(config: PretrainedConfig, module: str) -> None:
    with pytest.raises(CaptureError, match=f"module {module} cannot be captured: ") as error:
        capture(config, torch.float32)
    assert "\n" not in str(error.value)


def test_a_module_that_cannot_be_captured_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return x * 2 if x.sum().item() > 0 else x

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    module = r"model\.layers\.0\.mlp \(LlamaMLP\)"
    with pytest.raises(CaptureError, match=f"module {module} cannot be captured"):
        capture(families()["llama"], torch.float32)


def test_checkpoints_are_reproducible(tmp_path: Path) -> None:
    config = families()["qwen2-window"]
    first, second, other = (
        load_file(save_checkpoint(config, tmp_path / name, seed=seed) / "model.safetensors")
        for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
