"""Checkpoints: shards, dtypes, fingerprints, ends of answers, hub ids without a network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import families, save_checkpoint
from xllm.checkpoint import Checkpoint, CheckpointError, resolve
from xllm.demo import CHECKPOINT


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
