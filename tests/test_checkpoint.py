"""Checkpoints: shards, dtypes, fingerprints, ends of answers, hub ids without a network."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, dynamic_module_utils

from tests.tiny import families, save_checkpoint
from xllm.artifact import ArtifactWriter
from xllm.checkpoint import DTYPES, Checkpoint, CheckpointError, resolve
from xllm.compiler.capture import build_meta_model
from xllm.config import CompileConfig, ConfigError
from xllm.demo import CHECKPOINT
from xllm.llm import obtain
from xllm.progress import Reporter


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return save_checkpoint(families()["qwen2"], tmp_path / "a model")


def shard(path: Path) -> None:
    """Split model.safetensors in two, with an index, as large checkpoints come."""
    tensors = load_file(path / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({n: tensors[n] for n in part}, path / file)
    weight_map = {n: file for file, part in parts.items() for n in part}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (path / "model.safetensors").unlink()


def test_shards_hold_the_same_tensors(path: Path) -> None:
    whole = Checkpoint(path)
    before = {name: whole.load(name) for name in whole.tensors}
    shard(path)
    sharded = Checkpoint(path)
    assert sharded.tensors.keys() == before.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(sharded.load(name), tensor)


def test_a_missing_shard_is_named(path: Path) -> None:
    shard(path)
    (path / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks the weight file model-2.safetensors"):
        _ = Checkpoint(path).tensors


def test_fingerprint_follows_content(path: Path) -> None:
    first = Checkpoint(path).fingerprint
    assert Checkpoint(path).fingerprint == first
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(bytes(data))
    assert Checkpoint(path).fingerprint != first


def test_dtype_is_that_of_most_weights(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        saved = save_checkpoint(families()["llama"], tmp_path / str(dtype), dtype)
        assert Checkpoint(saved).dtype == dtype


def test_ends_of_answers(path: Path) -> None:
    assert Checkpoint(CHECKPOINT).eos_token_ids
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert Checkpoint(path).eos_token_ids == {7, 9}
    (path / "generation_config.json").unlink()
    assert Checkpoint(path).eos_token_ids == {2}


def test_names(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve("demo") == CHECKPOINT
    assert resolve(str(path)) == path
    monkeypatch.chdir(path.parent)
    assert resolve("a model") == path
    for bad in ("", "./no", "just-a-word", "a/b/c"):
        with pytest.raises(CheckpointError, match="accepted"):
            resolve(bad)


def test_hub_id_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="'owner/no-such-model'.*could not be fetched"):
        resolve("owner/no-such-model")


def reconfigure(path: Path, **values: object) -> None:
    """Change entries of config.json."""
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_every_stored_dtype_is_read_and_quantised_ones_do_not_decide(path: Path) -> None:
    stored = {name: torch.zeros(4, 4096).to(dtype) for name, dtype in DTYPES.items()}
    save_file(stored | {"more": torch.zeros(4, 8, dtype=torch.bfloat16)},
              path / "model.safetensors")
    checkpoint = Checkpoint(path)
    for name, dtype in DTYPES.items():
        assert checkpoint.load(name).dtype == checkpoint.info(name).dtype(name) == dtype
    assert checkpoint.dtype == torch.bfloat16


def test_pickled_weights_are_refused(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin, a pickle; accepted: safetens"):
        _ = Checkpoint(path).tensors


def test_an_unknown_model_type_is_read_as_its_architecture(tmp_path: Path) -> None:
    config = DeepseekV3Config(kv_lora_rank=16, architectures=["DeepseekV3ForCausalLM"])
    config.save_pretrained(tmp_path)
    reconfigure(tmp_path, model_type="kimi_k2", auto_map={"AutoConfig": "no_file.NoConfig"})
    read = Checkpoint(tmp_path).config
    assert type(read) is DeepseekV3Config and read.model_type == "deepseek_v3"
    assert read.kv_lora_rank == 16


REMOTE = """
import sys
from transformers import LlamaConfig, LlamaForCausalLM
sys.modules["remote_code_ran"] = sys
class NewConfig(LlamaConfig):
    model_type = "new"
class NewForCausalLM(LlamaForCausalLM):
    config_class = NewConfig
"""


def test_code_of_a_checkpoint_runs_if_trusted_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_checkpoint(families()["llama"], tmp_path / "new_model")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "remote_code_ran", raising=False)
    (path / "new.py").write_text(REMOTE)
    reconfigure(path, model_type="new", architectures=["NewForCausalLM"], auto_map={
        "AutoConfig": "new.NewConfig", "AutoModelForCausalLM": "new.NewForCausalLM"})
    with pytest.raises(CheckpointError, match="'new' is unknown .* under --trust-remote-code only"):
        _ = Checkpoint(path).config
    assert "remote_code_ran" not in sys.modules
    trusted = Checkpoint(path, trust_remote_code=True)
    model = build_meta_model(trusted.config, torch.float32)
    assert type(model).__name__ == "NewForCausalLM" and "remote_code_ran" in sys.modules
    before = trusted.fingerprint
    (path / "new.py").write_text(REMOTE + "# changed")
    assert Checkpoint(path, trust_remote_code=True).fingerprint != before


def test_an_artifact_of_trusted_code_wants_the_flag_again(tmp_path: Path) -> None:
    factor = {"value": True, "reason": "whose code is captured"}
    ArtifactWriter(tmp_path / "a").commit({"factors": {"trust_remote_code": factor}}, {})
    model = str(tmp_path / "a")
    with pytest.raises(ConfigError, match="under --trust-remote-code only"):
        obtain(model, CompileConfig(model), Reporter(quiet=True))
    trusting = CompileConfig(model, trust_remote_code=True)
    assert obtain(model, trusting, Reporter(quiet=True))[1] is None
