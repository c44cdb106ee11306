"""Embedder: which sentence-transformers files are followed, cut and normalisation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from xllm.runtime.embedding import Embedder, read_embedder
from xllm.runtime.sampling_params import RequestError

LAST = {"word_embedding_dimension": 8, "pooling_mode_cls_token": False,
        "pooling_mode_lasttoken": True, "include_prompt": True}


def write(directory: Path, kinds: list[str], pooling: object) -> Path:
    """A checkpoint's modules.json and pooling configuration."""
    modules = [{"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "",
                "type": f"sentence_transformers.models.{kind}"} for i, kind in enumerate(kinds)]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling/config.json").write_text(json.dumps(pooling))
    return directory


@pytest.mark.parametrize("pooling", [LAST, {"pooling_mode": "lasttoken"}])
@pytest.mark.parametrize("normalize", [True, False])
def test_last_token(tmp_path: Path, pooling: dict[str, object], normalize: bool) -> None:
    kinds = ["Transformer", "Pooling"] + ["Normalize"] * normalize
    assert read_embedder(write(tmp_path, kinds, pooling)) == Embedder(normalize)


def test_a_plain_language_model_is_normalised(tmp_path: Path) -> None:
    assert read_embedder(tmp_path) == Embedder(normalize=True)


@pytest.mark.parametrize(("kinds", "pooling", "reason"), [
    (["Transformer", "Pooling"], {"pooling_mode_mean_tokens": True}, "pools by mean_tokens; "),
    (["Transformer", "Pooling"], {**LAST, "pooling_mode_cls_token": True}, "cls_token\\+lasttoken"),
    (["Transformer", "Pooling"], {}, "pools by nothing"),
    (["Transformer", "Pooling"], [1], "cannot be followed"),
    (["Transformer", "Pooling", "Dense"], LAST, "lists Transformer, Pooling, Dense; served: "),
    (["Transformer"], LAST, "lists Transformer; served: "),
])
def test_what_is_not_served(tmp_path: Path, kinds: list[str], pooling: object, reason: str) -> None:
    embedder = read_embedder(write(tmp_path, kinds, pooling))
    with pytest.raises(RequestError, match=reason) as caught:
        embedder.check(None)
    assert caught.value.param == "model"


def test_a_broken_modules_file(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text("[{]")
    with pytest.raises(RequestError, match="cannot be followed: JSONDecodeError"):
        read_embedder(tmp_path).check(None)


def test_cut_then_normalised() -> None:
    hidden = torch.tensor([3.0, 4.0, 12.0])
    torch.testing.assert_close(Embedder().finish(hidden), hidden / 13)
    torch.testing.assert_close(Embedder().finish(hidden, 2), torch.tensor([0.6, 0.8]))
    torch.testing.assert_close(Embedder(normalize=False).finish(hidden, 2), hidden[:2])


@pytest.mark.parametrize("dimensions", [0, -1])
def test_no_dimensions(dimensions: int) -> None:
    with pytest.raises(RequestError, match=f"dimensions is {dimensions}; accepted: 1 or more"):
        Embedder().check(dimensions)


def test_more_dimensions_than_there_are() -> None:
    with pytest.raises(RequestError, match="dimensions is 4; accepted: 1 to 3"):
        Embedder().finish(torch.ones(3), 4)
