"""The report: what it lists, what it calls changed, which layers alike, what it escapes."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config

from xllm.compiler import report
from xllm.compiler.capture import capture
from xllm.compiler.pipeline import PIPELINE
from xllm.compiler.report_diff import Section, canonical, line_ops, rows_of, split_renamed
from xllm.compiler.runner import PassRecord, run_pipeline
from xllm.graph import Program
from xllm.passes.core import PassContext
from xllm.targets import find

LAYERS = 4
CONFIG = Qwen3Config(vocab_size=96, hidden_size=32, intermediate_size=48, head_dim=16,
                     num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
                     tie_word_embeddings=True)


def manifest_of(program: Program | None = None) -> dict:
    """A manifest as far as the page reads it."""
    values = {"target": "cpu", "backend": "eager", "dtype": "bfloat16"}
    pieces = program.pieces if program else {}
    return {
        "key": "0123abcd", "model": {"name": "tiny", "architecture": "Qwen3ForCausalLM",
                                     "dtype": "bfloat16", "layers": LAYERS, "context_length": 512},
        "factors": {k: {"value": v, "reason": "test"} for k, v in values.items()},
        "pieces": {name: {"calls": program.calls(name), "nodes": len(gm.graph.nodes),
                          "signature": ["not shown"]} for name, gm in pieces.items()},
        "schedule": [vars(call) for call in program.schedule] if program else [],
        "memory": {"page_size": 16, "kv_bytes_per_page": 4096, "weight_bytes": 10_000},
        "symbols": {"T": "tokens"}, "buckets": [], "seconds": {"capture": 1.0},
    }


@pytest.fixture(scope="module")
def compiled() -> tuple[list[PassRecord], Program]:
    program, facts = capture(CONFIG, torch.bfloat16)
    ctx = PassContext(facts, find("cpu"), torch.bfloat16, 16, program.inputs)
    return run_pipeline(program, ctx, PIPELINE), program


@pytest.fixture(scope="module")
def records(compiled: tuple[list[PassRecord], Program]) -> list[PassRecord]:
    return compiled[0]


@pytest.fixture(scope="module")
def page(compiled: tuple[list[PassRecord], Program]) -> str:
    return report.html(compiled[0], manifest_of(compiled[1]))


def data_of(page: str) -> dict:
    """The data that the page's script reads."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page,
                         re.DOTALL)
    return json.loads(text)


def rows_in(data: dict) -> list[str]:
    """The page's rows, put together as its script does."""
    parts = [template.split("\x01") for template in data["templates"]]
    numbers, rows = iter(data["lines"]), []
    for template in numbers:
        first, *others = parts[template]
        rows.append(first + "".join(f"{next(numbers)}{part}" for part in others))
    return rows


def sides(data: dict, index: int) -> dict[str, tuple[list[str], list[str]]]:
    """Lines before and after a pass, per piece, taken back out of the page."""
    rows, result = rows_in(data), {}
    for piece in data["passes"][index]["pieces"]:
        both = ([], [])
        for section in piece["sections"]:
            for _, *steps in section["members"]:
                for side, ids in zip(both, steps, strict=True):
                    side += [rows[i].split("\t")[1] for i in accumulate(ids)]
        result[piece["name"]] = both
    return result


def record(name: str, lines: list[tuple[str, str]], **values: object) -> PassRecord:
    return replace(PassRecord(name, "fused", 1, 1, 0.5, len(lines), {"model": lines}), **values)


def named(records: list[PassRecord], name: str) -> int:
    return [r.name for r in records].index(name)


def test_listings_name_each_pass_that_fired(records: list[PassRecord]) -> None:
    found = report.listings(records)
    assert "00_capture/model.txt" in found
    assert f"{named(records, 'fuse_add_rms_norm'):02d}_fuse_add_rms_norm/layer.txt" in found
    text = found["00_capture/model.txt"]
    assert "\n# model.layers.3.mlp.gate_proj\n    %linear_" in text
    assert text.count("\n    ") == records[0].nodes


def test_a_pass_that_changes_nothing_has_no_listing() -> None:
    lines = [("%a : f32[1] = aten.neg(%x)", "m")]
    same = record("same", lines, sites=3)
    idle = record("idle", [("%b : f32[1] = aten.neg(%x)", "m")], sites=0)
    assert list(report.listings([record("capture", lines), same, idle])) == ["00_capture/model.txt"]


def test_listings_do_not_depend_on_time(records: list[PassRecord]) -> None:
    slower = [replace(r, milliseconds=r.milliseconds + 5) for r in records]
    assert report.listings(slower) == report.listings(records)


def test_dump_writes_index_and_files(records: list[PassRecord], tmp_path: Path) -> None:
    report.dump(records, tmp_path / "a" / "b")
    index = (tmp_path / "a/b/index.txt").read_text().splitlines()
    assert len(index) == 1 + len(records)
    norms = 4 * LAYERS + 1
    assert re.search(rf"05_recognise_rms_norm +captured +{norms} +{norms} ", index[6])
    files = {str(f.relative_to(tmp_path / "a/b")) for f in tmp_path.rglob("*/*.txt")}
    assert files == {"index.txt", *report.listings(records)}


def test_dump_that_cannot_be_written_names_the_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(report.ReportError, match="cannot write the dump to .*file/x"):
        report.dump([record("capture", [])], tmp_path / "file" / "x")


def test_line_ops_tell_replaced_from_other_operands() -> None:
    left = ["%a : f32[1] = aten.neg(%x)", "%b : f32[1] = aten.abs(%a)",
            "%c : f32[1] = aten.sin(%b)"]
    right = ["%n : f32[1] = aten.abs(%x)", "%c : f32[1] = aten.sin(%n)"]
    assert list(line_ops(left, right)) == [("!", 1, 0), ("~", 2, 2)]
    assert list(line_ops(left, left)) == [("=", 3, 3)]


def ops_of(left: list[str], right: list[str]) -> list[tuple[str, int, int]]:
    section = Section("m", ["m\t" + x for x in left], ["m\t" + x for x in right])
    return list(split_renamed(section, tuple(line_ops(left, right)), {}))


def test_renamed_values_are_not_called_changed() -> None:
    left = ["%a_1 : f32[1] = aten.neg(%x)", "%b_1 : f32[1] = aten.add(%a_1, %x)"]
    assert ops_of(left, [s.replace("_1", "") for s in left]) == [("r", 2, 2)]
    swapped = ["%a : f32[1] = aten.neg(%x)", "%b : f32[1] = aten.add(%x, %a)"]
    assert ops_of(left, swapped) == [("r", 1, 1), ("~", 1, 1)]


def test_layers_are_alike_only_if_they_are() -> None:
    def layer(number: int, source: str, op: str = "neg", swap: bool = False) -> Section:
        path, weight = f"model.layers.{number}", f"%p_layers_{number}_w"
        pair = f"%{source}, {weight}" if not swap else f"{weight}, %{source}"
        rows = [f"{path}\t%{op}_{number} : f32[1] = aten.{op}({pair})"]
        return Section(path, rows, rows)

    first = canonical(layer(0, "embedding"))
    assert canonical(layer(11, "add_7")) == first
    assert canonical(layer(1, "add_7", op="abs")) != first
    assert canonical(layer(1, "add_7", swap=True)) != first


def test_rows_give_every_node_a_place() -> None:
    lines = [("%w : f32[1] <- Weight(recipe=Pack(part=Leaf(name='layers.2.a.weight')))", ""),
             ("%v : f32[1] <- Weight(recipe=Leaf(name='layers.1.a.weight'))", ""),
             ("%a : f32[1] = aten.neg(%w)", "layers.2.a"), ("%b : f32[1] = aten.neg(%a)", ""),
             ("%c : f32[1] = aten.neg(%b)", "_empty_hook"), ("return [%c]", "")]
    assert rows_of(lines)[0] == "inputs.layers.2\t%w : f32[1] <- Weight(Pack('layers.2.a.weight'))"
    assert [row.split("\t")[0] for row in rows_of(lines)[1:]] == [
        "inputs.layers.1", *["layers.2.a"] * 3, "outputs"]
    assert rows_of(lines[1:])[0].startswith("inputs\t")


def test_page_holds_every_line_of_every_pass(records: list[PassRecord], page: str) -> None:
    data = data_of(page)
    for index, (before, after) in enumerate(pairwise(r.snapshot for r in records), start=1):
        if before.keys() != after.keys():
            continue
        for piece, (left, right) in sides(data, index).items():
            for shown, lines in ((left, before[piece]), (right, after[piece])):
                assert sorted(shown) == sorted(row.split("\t")[1] for row in rows_of(lines))


def test_roll_up_loses_no_line(records: list[PassRecord], page: str) -> None:
    index = named(records, "roll_layers")
    found = sides(data_of(page), index)
    assert set(found) == {"prologue", "layer", "epilogue", "(folded)"}
    left = sorted(line for before, _ in found.values() for line in before)
    before = records[index - 1].snapshot["model"]
    assert left == sorted(row.split("\t")[1] for row in rows_of(before))
    assert any("%attention_3 " in line for line in found["(folded)"][0])
    assert found["(folded)"][1] == []
    assert any("%attention " in line for line in found["layer"][0])


def test_ops_account_for_every_row(page: str) -> None:
    for item in data_of(page)["passes"]:
        for section in (s for piece in item["pieces"] for s in piece["sections"]):
            left, right = sum(section["ops"][1::3]), sum(section["ops"][2::3])
            for _, before, after in section["members"]:
                assert (len(before), len(after)) == (left, right)


def test_like_layers_are_one_section(records: list[PassRecord], page: str) -> None:
    data = data_of(page)
    members = {s["title"]: [m[0] for m in s["members"]]
               for s in data["passes"][0]["pieces"][0]["sections"]}
    assert members["model.layers.#"] == members["inputs.model.layers.#"] == ["0", "1", "2", "3"]
    index = named(records, "recognise_silu_mul")
    groups = [(s["members"], s["ops"]) for s in data["passes"][index]["pieces"][0]["sections"]
              if s["title"] == "model.layers.#"]
    assert [[m[0] for m in ms] for ms, _ in groups] == [["0"], ["1", "2", "3"]]  # cse left 0 apart
    assert all("!" in ops for _, ops in groups)


def test_changes_are_the_rewrite_and_nothing_else(records: list[PassRecord], page: str) -> None:
    data, index = data_of(page), named(records, "recognise_silu_mul")
    rows, removed, added = rows_in(data), [], []
    for section in data["passes"][index]["pieces"][0]["sections"]:
        _, before, after = section["members"][-1]
        left, right, i, j = list(accumulate(before)), list(accumulate(after)), 0, 0
        ops = section["ops"]
        for kind, n, m in zip(ops[::3], ops[1::3], ops[2::3], strict=True):
            if kind == "!":
                removed += [rows[x] for x in left[i:i + n]]
                added += [rows[x] for x in right[j:j + m]]
            i, j = i + n, j + m
    assert sorted(set(re.findall(r"= (\S+?)\(", "\n".join(removed)))) == [
        "aten.mul.Tensor", "aten.silu"]
    assert re.findall(r"= (\S+?)\(", "\n".join(added)) == ["xllm.silu_mul"] * 2


def test_summary_and_search_data(records: list[PassRecord], page: str) -> None:
    data = data_of(page)
    assert [(p["name"], p["sites"], p["expected"], p["nodes"]) for p in data["passes"]] == [
        (r.name, r.sites, r.expected, r.nodes) for r in records]
    assert "Level: paged -> fused" in data["passes"][named(records, "fuse_add_rms_norm")]["doc"]
    assert data["manifest"]["pieces"]["layer"] == {
        "calls": LAYERS, "nodes": len(records[-1].snapshot["layer"])}
    assert [call["piece"] for call in data["manifest"]["schedule"]] == [
        "prologue", *["layer"] * LAYERS, "epilogue"]
    assert any("xllm.qk_norm_rope_kv_write" in row for row in rows_in(data))
    assert len(data["final"]["layer"]) == len(records[-1].snapshot["layer"])


def test_page_needs_no_network(page: str) -> None:
    assert not re.search(r"https?://|@import|url\(|<link|src=", page)
    assert "{{" not in page.replace(json.dumps(data_of(page)), "")[:20_000]


def test_page_escapes_what_it_shows() -> None:
    evil = "</script><script>alert(1)</script>&<!--"
    manifest = manifest_of()
    manifest["model"]["name"] = evil
    lines = [(f"%a : f32[1] = aten.neg(%x, '{evil}')", "m.<b>")]
    page = report.html([record("capture", lines), record(evil, lines)], manifest)
    assert "<script>alert" not in page and "<!--" not in page
    assert "<title>&lt;/script&gt;" in page
    data = data_of(page)
    assert rows_in(data) == [f"m.<b>\t{lines[0][0]}"]
    assert data["passes"][1]["name"] == data["manifest"]["model"]["name"] == evil


@pytest.mark.parametrize("line", [
    "%a_0 : f32[1, 7] = aten.add(%b_12, 0.05, 1e-06, 0.08838834764831845)",
    "%a_007 : f32[1] = aten.x_1(%p_layers_1234567890_w, -1.5)",
])
def test_lines_come_back_as_they_were(line: str) -> None:
    data = data_of(report.html([record("capture", [(line, "m.layers.3.n")])], manifest_of()))
    assert rows_in(data) == ["m.layers.3.n\t" + line]


def test_many_layers_stay_small_and_fast(records: list[PassRecord]) -> None:
    def grow(lines: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """40 copies of layer 3 behind the model, each with names of its own."""
        layer = [x for x in lines if x[1].startswith("model.layers.3.")]
        return lines + [
            (re.sub(r"%(?!p_)(\w+?)(_\d+)?\b", rf"%\1_{1000 * n}\2", line)
             .replace("layers_3", f"layers_{n}"),
             path.replace("layers.3.", f"layers.{n}."))
            for n in range(4, 44) for line, path in layer]

    early = records[:named(records, "roll_layers")]
    grown = [replace(r, snapshot={"model": grow(r.snapshot["model"])}) for r in early]
    start = time.process_time()
    page = report.html(grown, manifest_of())
    assert time.process_time() - start < 5
    assert len(grown[0].snapshot["model"]) > 3000
    assert len(page) < 600_000
    for item in data_of(page)["passes"]:
        assert sum(len(piece["sections"]) for piece in item["pieces"]) < 16
