"""Levels: which ops are legal where, and what verify says about a broken program."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.tiny import stages
from xllm.graph import Call, Program, State, add_placeholder, copy_program, placeholders
from xllm.levels import LEVELS, LevelError, allowed, verify
from xllm.ops import REGISTRY
from xllm.targets import find

KERNELS = find("cpu").kernels


def program(level: str) -> Program:
    """A tiny Llama behind the first pass that reaches a level, free to edit."""
    found, _, _ = stages("llama", torch.bfloat16)
    return copy_program(next(s.after for s in found if s.item.after == level))


def test_allowed_ops_exist_and_levels_replace_ops() -> None:
    for level in LEVELS:
        assert allowed(level, KERNELS) <= REGISTRY.keys()
    assert "attention" not in allowed("paged", KERNELS)
    assert "paged_attention" not in allowed("canonical", KERNELS)
    assert allowed("lowered", KERNELS) == KERNELS


@pytest.mark.parametrize("level", LEVELS)
def test_valid_programs_pass(level: str) -> None:
    verify(program(level), level, KERNELS)


def test_an_unknown_level_names_the_known_ones() -> None:
    with pytest.raises(LevelError, match="'melted'; known: captured, canonical"):
        verify(program("captured"), "melted", KERNELS)


@pytest.mark.parametrize(("level", "claimed", "op"), [
    ("paged", "canonical", "kv_write|paged_attention"), ("canonical", "paged", "attention"),
    ("fused", "lowered", "add_rms_norm|silu_mul|rms_norm"),
    ("fused", "paged", "add_rms_norm"),
])
def test_ops_of_another_level_are_named(level: str, claimed: str, op: str) -> None:
    with pytest.raises(LevelError, match=rf"level {claimed}: xllm\.({op})\S* is not allowed; "):
        verify(program(level), claimed, KERNELS)


def first_call(program: Program) -> torch.fx.Node:
    """A call node of the first piece."""
    gm = next(iter(program.pieces.values()))
    return next(n for n in gm.graph.nodes if n.op == "call_function")


def drop_type(program: Program) -> None:
    del first_call(program).meta["val"]


def drop_binding(program: Program) -> None:
    del placeholders(next(iter(program.pieces.values())))[0].meta["bind"]


def call_method(program: Program) -> None:
    node = first_call(program)
    with node.graph.inserting_after(node):
        node.graph.call_method("neg", (node,))


def read_undefined(program: Program) -> None:
    program.schedule.insert(0, program.schedule[-1])


def no_logits(program: Program) -> None:
    last = program.schedule.pop()
    program.schedule.append(Call(last.piece, last.leaves, last.carried, ("other",)))


@pytest.mark.parametrize(("broken", "message"), [
    (drop_type, "has no type"), (drop_binding, "placeholder without binding or type"),
    (call_method, "call_method nodes are not part"), (read_undefined, "reads .* before any"),
    (no_logits, "defines logits"),
])
def test_broken_programs(broken: Callable[[Program], None], message: str) -> None:
    edited = program("fused")
    broken(edited)
    with pytest.raises(LevelError, match=message):
        verify(edited, "fused", KERNELS)


def test_a_cache_before_the_paged_level() -> None:
    edited = program("canonical")
    (gm,) = (gm for name, gm in edited.pieces.items() if name in ("model", "prologue"))
    val = placeholders(gm)[0].meta["val"]
    add_placeholder(gm, "kv_cache", State("kv_cache"), val)
    with pytest.raises(LevelError, match="KV cache at level canonical"):
        verify(edited, "canonical", KERNELS)


def test_lint_runs() -> None:
    edited = program("fused")
    node = first_call(edited)
    output = node.graph.find_nodes(op="output")[0]
    output.append(node)  # now behind its users
    with pytest.raises((LevelError, RuntimeError)):
        verify(edited, "fused", KERNELS)
