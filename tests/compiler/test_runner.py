"""The runner: clean-up, levels, counts, records, checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tests.tiny import captured, stages
from xllm.compiler.pipeline import PIPELINE
from xllm.compiler.runner import (
    PassError,
    PassRecord,
    clean,
    run_pass,
    run_pipeline,
    snapshot,
    symbol_names,
)
from xllm.compiler.verify import Checker, VerifyError
from xllm.graph import Program, calls_of, copy_program, placeholders
from xllm.levels import LevelError
from xllm.passes.core import Pass, PassContext

aten = torch.ops.aten


def a_pass(run: Callable[..., int], expected: int | None = None, level: str = "captured") -> Pass:
    """A graph pass called ``sample``, declared exact."""
    return Pass("sample", run, lambda facts, ctx: expected, "graph", level, level,
                "Numerics: exact.")


@pytest.fixture
def tiny() -> tuple[Program, PassContext]:
    """A captured Llama."""
    return captured("llama", torch.float32)


def test_records(tiny: tuple[Program, PassContext]) -> None:
    seen: list[str] = []
    records = run_pipeline(*tiny, PIPELINE[:3], progress=seen.append)
    assert seen == [item.name for item in PIPELINE[:3]]
    assert [record.name for record in records] == ["capture", *seen]
    last: PassRecord = records[-1]
    assert last.nodes == tiny[0].num_nodes() and last.milliseconds >= 0 and last.error is None
    assert last.snapshot == snapshot(tiny[0])


def test_snapshot_names_symbols_and_modules(tiny: tuple[Program, PassContext]) -> None:
    assert set(symbol_names(tiny[0]).values()) == {"T", "S", "M", "R", "P"}
    clean(tiny[0])
    (rows,) = snapshot(tiny[0]).values()
    text = "\n".join(line for line, _ in rows)
    assert "%input_ids : i64[1, T] <- Input(name='input_ids')" in text
    assert not any(name in text for name in symbol_names(tiny[0]))
    assert "model.layers.0.self_attn.q_proj" in {path for _, path in rows}


def test_dead_nodes_and_unused_inputs_go(tiny: tuple[Program, PassContext]) -> None:
    program, _ = tiny
    (gm,) = program.pieces.values()
    weight = placeholders(gm)[0]
    with gm.graph.inserting_after(placeholders(gm)[-1]):
        dead = gm.graph.call_function(aten.neg.default, (weight,))
    weight.replace_all_uses_with(placeholders(gm)[1], delete_user_cb=lambda n: n is not dead)
    clean(program)
    assert dead not in gm.graph.nodes and weight not in gm.graph.nodes


def test_too_few_or_too_many_sites(tiny: tuple[Program, PassContext]) -> None:
    for sites in (2, 4):
        with pytest.raises(PassError, match=f"sample rewrote {sites} sites of LlamaForCausalLM, "
                                            "expected 3"):
            run_pass(a_pass(lambda gm, ctx: sites, 3), *tiny, "captured")
    record, level = run_pass(a_pass(lambda gm, ctx: 3, 3), *tiny, "captured")
    assert (record.sites, record.expected, level) == (3, 3, "captured")


def test_a_pass_at_the_wrong_level(tiny: tuple[Program, PassContext]) -> None:
    with pytest.raises(PassError, match="sample wants level paged, the program is at captured"):
        run_pass(a_pass(lambda gm, ctx: 0, level="paged"), *tiny, "captured")


def test_a_pass_that_breaks_the_level(tiny: tuple[Program, PassContext]) -> None:
    def untyped(gm: torch.fx.GraphModule, ctx: PassContext) -> int:
        del next(n for n in gm.graph.nodes if n.op == "call_function").meta["val"]
        return 1

    with pytest.raises(LevelError, match="has no type"):
        run_pass(a_pass(untyped), *tiny, "captured")


def negate_a_weight(gm: torch.fx.GraphModule, ctx: PassContext) -> int:
    """Changes values."""
    node = next(calls_of(gm, aten.linear.default))
    with gm.graph.inserting_before(node):
        negative = gm.graph.call_function(aten.neg.default, (node.args[1],))
    negative.meta["val"] = node.args[1].meta["val"]
    node.args = (node.args[0], negative)
    return 1


def test_check_sees_the_programs_before_and_after(tiny: tuple[Program, PassContext]) -> None:
    program, ctx = tiny
    seen = []

    def check(before: Program, after: Program, ctx: PassContext, item: Pass) -> float:
        seen.append((before.num_nodes(), after.num_nodes(), item.name))
        return 0.25

    table = (a_pass(negate_a_weight), a_pass(lambda gm, ctx: 0))
    records = run_pipeline(program, ctx, table, check)
    assert seen == [(records[0].nodes, records[0].nodes + 1, "sample")]
    assert [record.error for record in records] == [None, 0.25, None]


def test_the_checker_catches_a_pass_that_changes_values(tiny: tuple[Program, PassContext]) -> None:
    program, ctx = tiny
    check = Checker(program, draws=1)
    with pytest.raises(VerifyError, match="pass sample is declared 'exact' but changes logits"):
        run_pipeline(program, ctx, (a_pass(negate_a_weight),), check)


@pytest.mark.parametrize("doc", ["Numerics: fuzzy.", ""])
def test_a_pass_must_declare_its_numerics(tiny: tuple[Program, PassContext], doc: str) -> None:
    program, ctx = tiny
    item = replace(a_pass(lambda gm, ctx: 0), doc=doc)
    with pytest.raises(VerifyError, match="sample declares no numerics; known: exact"):
        Checker(program, draws=1)(program, program, ctx, item)


def test_the_checker_works_on_every_level() -> None:
    """As ``xllm compile --verify`` runs it, and no pass is off by more than it declares."""
    program, ctx = captured("llama", torch.float32)
    records = run_pipeline(program, ctx, PIPELINE, Checker(program, draws=1))
    assert all(record.error is not None for record in records[1:] if record.sites)


@pytest.mark.parametrize("name", ["recognise_rms_norm", "page_attention", "lower"])
def test_the_checker_catches_a_wrong_weight_at_any_level(name: str) -> None:
    found, _, ctx = stages("llama", torch.float32)
    stage = next(s for s in found if s.item.name == name)
    broken = copy_program(stage.after)
    last = next(reversed(broken.schedule))
    piece = next(c.piece for c in broken.schedule if c is not last or len(broken.schedule) == 1)
    gm = broken.pieces[piece]
    weight = next(n for n in placeholders(gm) if n.meta["val"].dim() == 1 and "norm" in n.name)
    with gm.graph.inserting_after(placeholders(gm)[-1]):
        twice = gm.graph.call_function(aten.add.Tensor, (weight, weight))
    weight.replace_all_uses_with(twice, delete_user_cb=lambda user: user is not twice)
    with pytest.raises(VerifyError, match=name):
        Checker(captured("llama", torch.float32)[0], draws=1)(stage.before, broken, ctx, stage.item)
