"""Loaded parameters belong to the process: no views of files, no memory that nobody needs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from xllm.checkpoint import Checkpoint
from xllm.runtime.loader import _Weights
from xllm.weights import Concat, Leaf, Recipe, Reshape, Slice, Stack

A = torch.arange(1024.0).view(64, 16)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": A}, tmp_path / "model.safetensors")
    return Checkpoint(tmp_path)


@pytest.mark.parametrize(("recipe", "wanted"), [
    (Leaf("a"), A),
    (Slice(Leaf("a"), 0, 32, 64), A[32:]),
    (Reshape(Leaf("a"), (8, 128)), A.view(8, 128)),
    (Slice(Concat((Leaf("a"), Leaf("a"))), 0, 96, 128), A[32:]),
    (Reshape(Slice(Stack((Leaf("a"), Leaf("a"))), 0, 1, 2), (64, 16)), A),
])
def test_a_file_that_changes_later_changes_no_weight(
    recipe: Recipe, wanted: torch.Tensor, checkpoint: Checkpoint
) -> None:
    made = _Weights(checkpoint).make(recipe, torch.float32)
    with (checkpoint.path / "model.safetensors").open("r+b") as file:
        file.seek(-64, 2)
        file.write(bytes(64))
    assert torch.equal(made, wanted)
    assert made.untyped_storage().nbytes() == made.nbytes


def test_a_recipe_is_made_once_per_dtype(checkpoint: Checkpoint) -> None:
    maker = _Weights(checkpoint)
    once, again = (maker.make(Leaf("a"), torch.bfloat16) for _ in range(2))
    assert once is again and once.dtype == torch.bfloat16
    assert maker.make(Leaf("a"), torch.float32).dtype == torch.float32
    assert maker.bytes() == A.numel() * (2 + 4)
