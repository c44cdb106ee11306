"""Recipes of parameters against ``from_pretrained``; damaged checkpoints name what is wrong."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DeepseekV3Config,
    Gemma2Config,
    GptOssConfig,
    MiMoV2FlashConfig,
    MixtralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen3MoeConfig,
    core_model_loading,
)
from transformers.core_model_loading import ConversionOps, WeightConverter

from xllm.backends.eager import interpret
from xllm.checkpoint import Checkpoint, CheckpointError, TensorInfo
from xllm.compiler import sources as module
from xllm.compiler.capture import capture
from xllm.compiler.sources import check_tied, keep_float32, sources
from xllm.compiler.standin import StandIn, UnknownConversion
from xllm.compiler.verify import on_host
from xllm.graph import Constant, Input, Weight, placeholders
from xllm.weights import Leaf, evaluate, leaves

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
VISION = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2,
          "out_hidden_size": 32, "fullatt_block_indexes": [1]}
TEXT = SIZES | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                    "mrope_section": [1, 1, 2]}}

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "qwen3_moe": lambda: Qwen3MoeConfig(head_dim=8, num_experts=12, **EXPERTS, **SIZES),
    "deepseek_v3": lambda: DeepseekV3Config(
        q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
        n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1, n_group=2, topk_group=1,
        **EXPERTS, **{**SIZES, "num_key_value_heads": 4}),
    "mixtral": lambda: MixtralConfig(num_local_experts=4, **SIZES),
    "gpt_oss": lambda: GptOssConfig(head_dim=8, num_local_experts=4, num_experts_per_tok=2,
                                    sliding_window=4, **SIZES),
    "mimo_v2": lambda: MiMoV2FlashConfig(**{**SIZES, "n_routed_experts": 4}, **EXPERTS),
    "gemma2": lambda: Gemma2Config(head_dim=8, sliding_window=4, **SIZES),
    "phi3": lambda: Phi3Config(**SIZES),
    "qwen2_5_vl": lambda: Qwen2_5_VLConfig(text_config=TEXT, vision_config=VISION,
                                           tie_word_embeddings=True),
}


def auto(config: PretrainedConfig) -> type:
    vision = "vision_config" in config.to_dict()
    return AutoModelForImageTextToText if vision else AutoModelForCausalLM


def save(config: PretrainedConfig, path: Path, shard: str = "1GB") -> Path:
    """A float32 checkpoint in which every stored number is random."""
    torch.manual_seed(0)
    model = auto(config).from_config(config, dtype=torch.float32)
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape))
    model.save_pretrained(path, max_shard_size=shard)
    return path


def meta_model(checkpoint: Checkpoint, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    with torch.device("meta"):
        model = auto(checkpoint.config).from_config(checkpoint.config, dtype=dtype)
    keep_float32(model, dtype)
    return model


def assert_as_from_pretrained(path: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Every parameter and buffer of the checkpoint, bit by bit."""
    checkpoint = Checkpoint(path)
    model = meta_model(checkpoint, dtype)
    recipes, state = sources(model, checkpoint.tensors), model.state_dict()
    wanted = auto(checkpoint.config).from_pretrained(path, dtype=dtype).state_dict()
    assert recipes.keys() == wanted.keys()
    for name, tensor in wanted.items():
        got = evaluate(recipes[name], checkpoint.load).to(state[name].dtype)
        assert got.dtype == tensor.dtype and torch.equal(got, tensor), name


def change(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    """Edit the tensors of a checkpoint."""
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def refusal(path: Path) -> str:
    checkpoint = Checkpoint(path)
    with pytest.raises(CheckpointError) as error:
        sources(meta_model(checkpoint), checkpoint.tensors)
    return str(error.value)


@pytest.fixture
def moe(tmp_path: Path) -> Path:
    return save(CONFIGS["qwen3_moe"](), tmp_path / "model")


@pytest.mark.parametrize("family", CONFIGS)
def test_recipes_give_what_from_pretrained_gives(family: str, tmp_path: Path) -> None:
    assert_as_from_pretrained(save(CONFIGS[family](), tmp_path / "model"))


def test_shards(tmp_path: Path) -> None:
    path = save(CONFIGS["deepseek_v3"](), tmp_path / "model", shard="20KB")
    assert len(list(path.glob("*.safetensors"))) > 3
    assert_as_from_pretrained(path, torch.float32)


def test_stacked_layout_and_the_one_per_expert(moe: Path, tmp_path: Path) -> None:
    stored = Checkpoint(moe).tensors
    assert "model.layers.0.mlp.experts.11.gate_proj.weight" in stored
    state = AutoModelForCausalLM.from_pretrained(moe, dtype=torch.float32).state_dict()
    (moe / "model.safetensors").unlink()
    save_file(state, moe / "model.safetensors", {"format": "pt"})
    assert "model.layers.0.mlp.experts.gate_up_proj" in Checkpoint(moe).tensors
    assert_as_from_pretrained(moe)


def test_experts_are_in_numeric_order(moe: Path) -> None:
    checkpoint = Checkpoint(moe)
    recipe = sources(meta_model(checkpoint), checkpoint.tensors)["model.layers.1.mlp.experts."
                                                                 "down_proj"]
    assert leaves(recipe) == [f"model.layers.1.mlp.experts.{i}.down_proj.weight"
                              for i in range(12)]


def test_base_model_prefix_is_added(moe: Path) -> None:
    def strip(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.startswith("model.")]:
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    assert_as_from_pretrained(change(moe, strip))


def test_layers_that_the_model_lacks_are_left_out(tmp_path: Path) -> None:
    def add(tensors: dict[str, Tensor]) -> None:  # multi-token prediction, as DeepSeek-V3 has it
        for name in [n for n in tensors if "layers.1." in n]:
            tensors[name.replace("layers.1.", "layers.2.")] = tensors[name].clone()
        tensors["model.layers.2.eh_proj.weight"] = torch.randn(32, 64)

    path = change(save(CONFIGS["deepseek_v3"](), tmp_path / "model"), add)
    assert_as_from_pretrained(path)


def test_either_of_two_tied_tensors_makes_both(tmp_path: Path) -> None:
    path = save(CONFIGS["gemma2"](), tmp_path / "model")
    assert "lm_head.weight" not in Checkpoint(path).tensors
    change(path, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    assert_as_from_pretrained(path)


def test_two_tied_tensors_that_differ_are_refused(tmp_path: Path) -> None:
    path = save(CONFIGS["gemma2"](), tmp_path / "model")
    for factor, fine in ((1, True), (2, False)):
        change(path, lambda t, f=factor: t.update(
            {"lm_head.weight": t["model.embed_tokens.weight"] * f}))
        checkpoint = Checkpoint(path)
        model = meta_model(checkpoint)
        found = sources(model, checkpoint.tensors)
        if fine:
            check_tied(model, found, checkpoint)
            continue
        with pytest.raises(CheckpointError, match="ties lm_head.weight to model.embed_tokens"):
            check_tied(model, found, checkpoint)


def test_a_missing_tensor_is_left_out_and_a_missing_expert_is_named(moe: Path) -> None:
    change(moe, lambda t: t.pop("model.norm.weight"))
    checkpoint = Checkpoint(moe)
    assert "model.norm.weight" not in sources(meta_model(checkpoint), checkpoint.tensors)
    change(moe, lambda t: t.pop("model.layers.1.mlp.experts.1.up_proj.weight"))
    assert ("lacks the tensor model.layers.1.mlp.experts.1.up_proj.weight, which model.layers.1."
            "mlp.experts.gate_up_proj needs") in refusal(moe)


def test_a_missing_last_expert_is_named(moe: Path) -> None:
    last = "model.layers.0.mlp.experts.11."
    change(moe, lambda t: [t.pop(n) for n in list(t) if n.startswith(last)])
    assert f"lacks the tensor {last}" in refusal(moe)


def test_a_missing_kind_of_tensor_is_named(moe: Path) -> None:
    change(moe, lambda t: [t.pop(n) for n in list(t) if "experts" in n and "gate_proj" in n])
    assert "lacks the tensor mlp.experts.*.gate_proj.weight" in refusal(moe)


def test_wrong_shapes_are_named(moe: Path) -> None:
    odd = "model.layers.0.mlp.experts.3.gate_proj.weight"
    change(moe, lambda t: t.update({odd: t[odd][:, :-1].contiguous()}))
    assert f"tensor {odd} has shape [16, 31], the others of its kind [16, 32]" in refusal(moe)
    change(moe, lambda t: t.update({n: v[:8].contiguous() for n, v in t.items()
                                    if "experts" in n and "down_proj" not in n}))
    change(moe, lambda t: t.update({odd: torch.zeros(8, 32)}))
    assert ("experts.0.gate_proj.weight [8, 32] and 23 more: has shape [12, 16, 32], config.json "
            "implies [12, 32, 32]") in refusal(moe)
    change(moe, lambda t: t.update({"lm_head.weight": torch.zeros(95, 32)}))
    assert "tensor lm_head.weight has shape [95, 32], config.json implies [96, 32]" in refusal(moe)


def test_quantised_numbers_are_no_weights(moe: Path) -> None:
    name = "model.layers.0.mlp.experts.0.down_proj.weight"
    alike = [name.replace("experts.0", f"experts.{i}") for i in range(12)]
    change(moe, lambda t: t.update({n: t[n].to(torch.float8_e4m3fn) for n in alike}))
    assert f"{name} has dtype F8_E4M3; accepted: F32, BF16, F16, F64" in refusal(moe)


CONVERSIONS: list[tuple[ConversionOps, list[str], list[str], tuple[int, ...]]] = [
    (core_model_loading.Chunk(dim=0), ["qkv"], ["q", "k", "v"], (12, 5)),
    (core_model_loading.Chunk(dim=-1), ["ab"], ["a", "b"], (3, 4)),
    (core_model_loading.Concatenate(dim=1), ["a", "b"], ["ab"], (3, 4)),
    (core_model_loading.Interleave(dim=1), ["a"], ["b"], (2, 6, 3)),
    (core_model_loading.Interleave(dim=0, inverse=True), ["a"], ["b"], (6, 3)),
    (core_model_loading.MergeModulelist(dim=0), ["x.*.a"], ["x.a"], (3, 4)),
    (core_model_loading.MergeModulelist(dim=1), ["x.*.a"], ["x.a"], (3, 4)),
    (core_model_loading.SplitModulelist(dim=0), ["x.a"], ["x.*.a"], (3, 1, 4)),
    (core_model_loading.Transpose(1, 2), ["a"], ["b"], (2, 3, 4)),
    (core_model_loading.Conv3dToLinear(3, (2, 4, 4)), ["a"], ["b"], (5, 3, 2, 4, 4)),
    (core_model_loading.LinearToConv3d(3, (2, 4, 4)), ["a"], ["b"], (5, 96)),
    (core_model_loading.PermuteForRope(), ["a"], ["b"], (32, 6)),
    (core_model_loading.PermuteForRope(inverse=True), ["a"], ["b"], (32,)),
    (core_model_loading.ErnieFuseAndSplitTextVisionExperts(), ["x.*.a", "x.*.b"], ["t", "v"],
     (3, 4)),
]


@pytest.mark.parametrize(("op", "inputs", "outputs", "shape"), CONVERSIONS,
                         ids=lambda x: type(x).__name__ if isinstance(x, ConversionOps) else "")
def test_conversions_of_transformers_are_recipes(
    op: ConversionOps, inputs: list[str], outputs: list[str], shape: tuple[int, ...]
) -> None:
    data = {f"{name}{i}": torch.randn(shape) for name in inputs
            for i in range(4 if "*" in name else 1)}
    results = []
    for tensors in (data, {n: StandIn(t.to("meta"), Leaf(n)) for n, t in data.items()}):
        collected = {name: [t for n, t in tensors.items() if n.startswith(name)] for name in inputs}
        results.append(op.convert(collected, source_patterns=inputs, target_patterns=outputs,
                                  config=CONFIGS["mixtral"]()))
    wanted, made = results
    assert made.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert made[name].shape == tensor.shape
        assert torch.equal(evaluate(made[name].recipe, data.__getitem__), tensor)


class Negate(ConversionOps):
    """A conversion that computes instead of moving."""

    def convert(self, input_dict: dict, source_patterns: list, target_patterns: list,
                **kwargs: object) -> dict:
        return {target_patterns[0]: -input_dict[source_patterns[0]][0]}


def test_an_unknown_conversion_is_named(moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    negated = [WeightConverter("lm_head.weight", "lm_head.weight", [Negate()])]
    monkeypatch.setattr(module, "get_model_conversion_mapping", lambda model: negated)
    checkpoint = Checkpoint(moe)
    with pytest.raises(UnknownConversion, match=r"lm_head.weight: .* by Negate: .*aten.neg"):
        sources(meta_model(checkpoint), checkpoint.tensors)


def test_names_and_shapes_of_256_experts_take_seconds() -> None:
    config = DeepseekV3Config()  # 671B: 61 layers of 256 experts
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    wide, high = config.hidden_size, config.moe_intermediate_size
    tensors = {
        f"model.layers.{layer}.mlp.experts.{i}.{name}.weight": TensorInfo(Path("x"), shape, "BF16")
        for layer in range(3, 61) for i in range(256)
        for name, shape in (("gate_proj", (high, wide)), ("up_proj", (high, wide)),
                            ("down_proj", (wide, high)))
    }
    begin = time.monotonic()
    assert len(sources(model, tensors)) == 2 * 58
    assert time.monotonic() - begin < 60  # 3.6 s on two busy cores


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe", "gemma2"])
def test_the_captured_graph_with_its_recipes_is_the_model(family: str, tmp_path: Path) -> None:
    path = save(CONFIGS[family](), tmp_path / "model")
    checkpoint = Checkpoint(path)
    program, _ = capture(checkpoint.config, torch.float32)
    recipes = sources(meta_model(checkpoint, torch.float32), checkpoint.tensors)
    ids = torch.randint(3, 96, (1, 9))
    inputs = {"input_ids": ids, "positions": torch.arange(9).unsqueeze(0)}
    arguments = []
    for node in program.pieces["model"].graph.find_nodes(op="placeholder"):
        match node.meta["bind"]:
            case Weight(Leaf(name)):
                assert node.meta["val"].dtype == torch.float32
                arguments.append(evaluate(recipes[name], checkpoint.load))
            case Constant(name):
                arguments.append(program.constants[name])
            case Input(name):
                arguments.append(inputs[name])
    (logits,) = interpret(on_host(program.pieces["model"]))(arguments)
    wanted = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


def test_what_transformers_keeps_in_float32_stays_so_in_the_graph() -> None:
    program, _ = capture(CONFIGS["deepseek_v3"](), torch.bfloat16)
    dtypes = {node.meta["bind"].recipe.name: node.meta["val"].dtype
              for node in placeholders(program.pieces["model"], Weight)}
    kept = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert kept == {"model.layers.1.mlp.gate.e_score_correction_bias"}
    assert program.schedule[0].leaves.keys() == dtypes.keys()
