"""Inspection: what it prints of an artifact, what it calls different, what it refuses."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from xllm import inspection
from xllm.artifact import Artifact, ArtifactError, ArtifactWriter
from xllm.compiler import report
from xllm.compiler.pipeline import PIPELINE
from xllm.compiler.runner import PassRecord

CAPTURED = {"model": [("%x : f32[1] <- Input(name='x')", ""),
                      ("%a : f32[1] = aten.silu(%x)", "layers.0"), ("return [%a]", "")]}
LOWERED = {"layer": [("%x : f32[1] <- Input(name='x')", ""),
                     ("%b : f32[1] = xllm.silu_mul(%x, %x)", "layers.0"), ("return [%b]", "")],
           "epilogue": [("return [%x]", "")]}
RECIPE = [{"w": {"pack": {"concat": [{"leaf": "q"}, {"leaf": "k"}]}}}, {"w": {"leaf": "o"}}]


def records() -> list[PassRecord]:
    return [PassRecord("capture", "captured", 1, 1, 0.0, 3, CAPTURED),
            PassRecord("drop_noops", "captured", 0, None, 1.0, 3, CAPTURED),
            PassRecord("lower", "lowered", 2, 2, 3.21, 4, LOWERED, error=2e-7)]


def manifest() -> dict:
    return {
        "key": "feedbeef",
        "factors": {"target": {"value": "cpu", "reason": "instruction set and kernels"},
                    "backend": {"value": "eager", "reason": "what the blobs are"},
                    "dtype": {"value": "bfloat16", "reason": "every tensor in the graphs"}},
        "model": {"name": "tiny[bold]", "architecture": "Qwen3ForCausalLM", "layers": 2,
                  "dtype": "bfloat16", "context_length": 64},
        "pieces": {"layer": {"calls": 2, "nodes": 3, "signature": []},
                   "epilogue": {"calls": 1, "nodes": 1, "signature": []}},
        "schedule": [{"piece": "layer"}, {"piece": "layer"}, {"piece": "epilogue"}],
        "symbols": {"T": "tokens"},
        "weights": [{"class": "mlp.down_proj", "stored": "int4, 128 inputs per scale",
                     "memory": "int4", "bytes": 2048}],
        "memory": {"page_size": 16, "max_tokens": 64, "max_sequences": 4,
                   "kv_bytes_per_page": 32_768, "weight_bytes": 3 << 20},
        "buckets": [{"tokens": 1, "variant": "decode_1", "padded": True},
                    {"tokens": 64, "variant": "symbolic", "padded": False}],
    }


def write(path: Path, changed: list[PassRecord] | None = None, recipe: object = None,
          without: str = "", **values: object) -> Artifact:
    """An artifact made by hand; ``values`` replace entries of the manifest, one may be left out."""
    done, body = changed or records(), {**copy.deepcopy(manifest()), **values}
    body["passes"] = [{"name": r.name, "level": r.level, "sites": r.sites, "expected": r.expected,
                       "nodes": r.nodes, "error": r.error}
                      for r in done]
    writer = ArtifactWriter(path)
    for name, text in report.listings(done).items():
        writer.text(f"graphs/{name}", text)
    spent = {"seconds": {"capture": 1.25, "passes": 2.5},
             "milliseconds": [r.milliseconds for r in done]}
    writer.text("report/index.html", report.html(done, body | spent))
    writer.text("weights/recipe.json", json.dumps(recipe or RECIPE))
    writer.commit({name: value for name, value in body.items() if name != without}, spent)
    return Artifact(path)


def printed(function: object, *args: object) -> tuple[str, object]:
    """What a function prints on a wide terminal, blanks squeezed, and what it returns."""
    console = Console(width=160, force_terminal=False)
    with console.capture() as capture:
        result = function(*args, console)
    lines = (" ".join(line.split()) for line in capture.get().splitlines())
    return "\n".join(lines), result


# --- inspect ------------------------------------------------------------------------------------

def test_inspect_prints_the_tables(tmp_path: Path) -> None:
    text, _ = printed(inspection.inspect, write(tmp_path / "a"))
    assert text.index("lowered layer") < text.index("lowered epilogue")  # as they are called
    for line in ("tiny[bold]: Qwen3ForCausalLM, 2 layers, bfloat16, for cpu (eager)",
                 "1 drop_noops captured - 0 1.0 3 -", "2 lower lowered 2 2 3.2 4 2.0e-07",
                 "captured model 3 1", "lowered epilogue 1 1", "lowered layer 3 2",
                 "1 decode_1 yes", "leaf 3", "concat 1", "pack 1", "weights 3.00 MiB",
                 "KV cache per page 32.00 KiB", "KV cache per token 2.00 KiB", "total 3.8",
                 f"report: {tmp_path}/a/report/index.html"):
        assert line in text.splitlines(), f"{line!r} is not in\n{text}"


def test_unverified_passes_have_no_error_column(tmp_path: Path) -> None:
    unverified = [*records()[:2], replace(records()[2], error=None)]
    text, _ = printed(inspection.inspect, write(tmp_path / "a", unverified))
    assert "2 lower lowered 2 2 3.2 4" in text.splitlines()
    assert "max error" not in text


def test_inspect_lets_corruption_through(tmp_path: Path) -> None:
    artifact = write(tmp_path / "a")
    file = tmp_path / "a/graphs/02_lower/layer.txt"
    file.write_text(file.read_text() + " ")
    with pytest.raises(ArtifactError, match="layer.txt is corrupt"):
        printed(inspection.inspect, artifact)
    with pytest.raises(ArtifactError, match="no manifest.json"):
        printed(inspection.inspect, Artifact(tmp_path / "nothing"))


def test_inspect_names_what_a_manifest_lacks(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="manifest.json lacks 'memory'"):
        printed(inspection.inspect, write(tmp_path / "a", without="memory"))


@pytest.mark.parametrize(("count", "text"), [
    (0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (5 << 20, "5.00 MiB"), (3 << 30, "3.00 GiB"),
    (2 << 40, "2048.00 GiB")])
def test_size(count: int, text: str) -> None:
    assert inspection.size(count) == text


# --- diff ---------------------------------------------------------------------------------------

def test_equal_artifacts(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a"), write(tmp_path / "b", seconds={"capture": 9.0})
    assert printed(inspection.diff, a, b) == ("no difference", True)


def test_diff_names_factor_values_and_reason(tmp_path: Path) -> None:
    factors = manifest()["factors"]
    factors["target"]["value"] = "cuda"
    factors["isa"] = {"value": "amx", "reason": "compiled code is bound to it"}
    text, equal = printed(inspection.diff, write(tmp_path / "a"),
                          write(tmp_path / "b", factors=factors))
    assert not equal
    assert "target cpu cuda instruction set and kernels" in text
    assert "isa - amx compiled code is bound to it" in text
    assert "dtype" not in text and "no difference" not in text


def test_diff_shows_passes_and_lowered_graphs(tmp_path: Path) -> None:
    changed = records()
    changed[2].sites = 1
    changed[2].snapshot = {**LOWERED, "layer": [
        LOWERED["layer"][0], ("%b : f32[1] = aten.mul.Tensor(%x, %x)", "layers.0"),
        LOWERED["layer"][2]]}
    text, equal = printed(inspection.diff, write(tmp_path / "a"), write(tmp_path / "b", changed))
    assert not equal
    assert "lower 2 sites, 4 nodes 1 sites, 4 nodes" in text
    assert "--- a/layer\n+++ b/layer" in text
    assert "\n- %b : f32[1] = xllm.silu_mul(%x, %x)\n" in text
    assert "\n+ %b : f32[1] = aten.mul.Tensor(%x, %x)\n" in text
    assert "epilogue" not in text and "drop_noops" not in text


def test_diff_caps_long_graphs(tmp_path: Path) -> None:
    changed = records()
    many = [(f"%n{i} : f32[1] = aten.neg(%x)", "layers.0") for i in range(200)]
    changed[2].snapshot = {**LOWERED, "layer": many}
    text, _ = printed(inspection.diff, write(tmp_path / "a"), write(tmp_path / "b", changed))
    assert "%n10 " in text and "%n100 " not in text
    assert "more lines" in text


@pytest.mark.parametrize(("values", "line"), [
    ({"memory": {**manifest()["memory"], "page_size": 32}}, "memory: page_size 16 32"),
    ({"buckets": manifest()["buckets"][1:]}, "bucket of 1 tokens decode_1, padded -"),
    ({"recipe": RECIPE[:1]}, "weights/recipe.json"),
])
def test_diff_of_plan(tmp_path: Path, values: dict, line: str) -> None:
    text, equal = printed(inspection.diff, write(tmp_path / "a"), write(tmp_path / "b", **values))
    assert not equal
    assert line in text


# --- passes -------------------------------------------------------------------------------------

def test_pass_table_has_every_pass() -> None:
    text, _ = printed(inspection.list_passes, PIPELINE)
    for item in PIPELINE:
        assert f"{item.name} {item.before} -> {item.after}" in text
    assert "fuse_add_rms_norm paged -> fused exact Fuse the residual add" in text


def test_one_pass_prints_its_whole_docstring() -> None:
    text, _ = printed(lambda console: inspection.list_passes(PIPELINE, console, "pack_linear"))
    (doc,) = (item.doc for item in PIPELINE if item.name == "pack_linear")
    assert " ".join(doc.split()) in " ".join(text.split())


def test_unknown_pass_names_alternatives() -> None:
    with pytest.raises(ValueError, match="'fuse_add_norm'; did you mean fuse_add_rms_norm.*cse"):
        inspection.list_passes(PIPELINE, Console(), "fuse_add_norm")


@pytest.mark.parametrize(("doc", "text"), [
    ("Level: a -> b. Numerics: same\nrounding (one sequence); more.", "same rounding"),
    ("Level: a -> b.", "not stated")])
def test_numerics(doc: str, text: str) -> None:
    assert inspection.numerics(doc) == text
