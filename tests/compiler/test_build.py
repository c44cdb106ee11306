"""Artifacts of two compiles of the same thing, and compiles that may share a destination."""

from __future__ import annotations

from pathlib import Path

from tests.tiny import families, save_checkpoint
from xllm.compiler import build, plan
from xllm.config import CompileConfig
from xllm.progress import Reporter

QUIET = Reporter(quiet=True)


def test_manifest_and_graphs_are_reproducible(tmp_path: Path) -> None:
    model = save_checkpoint(families()["qwen2"], tmp_path / "model")
    config = CompileConfig(str(model), backend="eager", max_tokens=32, max_sequences=4)
    made = [build.compile_model(plan.plan(config, tmp_path / name, QUIET), QUIET)
            for name in ("a", "b")]
    files = [{str(f.relative_to(m.path)): f.read_bytes() for f in m.path.rglob("*")
              if f.is_file() and f.parent.name != "report"} for m in made]
    assert files[0].keys() == files[1].keys()
    assert [name for name in files[0] if files[0][name] != files[1][name]] == []


def test_a_found_artifact_is_the_compiled_one(tmp_path: Path) -> None:
    model = save_checkpoint(families()["qwen2"], tmp_path / "model")
    config = CompileConfig(str(model), backend="eager", max_tokens=32, max_sequences=4)
    planned = plan.plan(config, tmp_path / "a", QUIET)
    assert plan.find_cached(planned, QUIET) is None
    made = build.compile_model(planned, QUIET)
    assert plan.find_cached(planned, QUIET).manifest == made.manifest
    other = plan.plan(CompileConfig(str(model), backend="eager", max_tokens=64, max_sequences=4),
                      tmp_path / "a", QUIET)
    assert plan.find_cached(other, QUIET) is None
