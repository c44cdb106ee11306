"""Keys, sealing, and an artifact that appears whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xllm.artifact import SCHEMA, Artifact, ArtifactError, ArtifactWriter, Factor, key_of, seal


def test_key_depends_on_every_value_and_on_no_reason() -> None:
    base = {"torch": Factor("2.13", "code"), "dtype": Factor("bfloat16", "graphs")}
    assert key_of(base) == key_of({"dtype": Factor("bfloat16", "x"), "torch": Factor("2.13", "")})
    for name in base:
        assert key_of(base) != key_of(base | {name: Factor("other", "code")})


def make(path: Path, **manifest: object) -> Artifact:
    writer = ArtifactWriter(path)
    writer.text("graphs/a.txt", "graph")
    writer.commit({"key": "k", **manifest}, {})
    return Artifact(path)


def test_files_are_checked(tmp_path: Path) -> None:
    artifact = make(tmp_path / "a")
    assert artifact.file("graphs/a.txt").read_text() == "graph"
    with pytest.raises(ArtifactError, match="lacks graphs/b.txt"):
        artifact.file("graphs/b.txt")
    (artifact.path / "graphs/a.txt").write_text("grapf")
    with pytest.raises(ArtifactError, match="sha256"):
        artifact.file("graphs/a.txt")


def test_manifest_is_sealed(tmp_path: Path) -> None:
    artifact = make(tmp_path / "a")
    file = artifact.path / "manifest.json"
    body = json.loads(file.read_text())
    file.write_text(json.dumps(body | {"key": "other"}))
    with pytest.raises(ArtifactError, match="digest"):
        _ = Artifact(artifact.path).manifest
    file.write_text(seal(body | {"schema": SCHEMA + 1}))
    with pytest.raises(ArtifactError, match=f"schema {SCHEMA + 1}"):
        _ = Artifact(artifact.path).manifest
    file.write_text("{")
    with pytest.raises(ArtifactError, match="corrupt"):
        _ = Artifact(artifact.path).manifest


def test_whole_or_not_at_all(tmp_path: Path) -> None:
    writer = ArtifactWriter(tmp_path / "a")
    writer.text("graphs/a.txt", "graph")
    assert not (tmp_path / "a").exists()
    writer.discard()
    assert not list(tmp_path.iterdir())
    make(tmp_path / "a", number=1)
    assert make(tmp_path / "a", number=2).manifest["number"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
