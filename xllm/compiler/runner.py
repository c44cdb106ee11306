"""The bookkeeping around passes: clean-up, levels, counts, timing, snapshots, verification."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from xllm import levels
from xllm.errors import UserError
from xllm.graph import (
    ENCODE_DIMS,
    IMAGE_DIMS,
    INPUT_DIMS,
    SYMBOLS,
    Program,
    copy_program,
    placeholders,
)
from xllm.passes.core import Pass, PassContext, module_of
from xllm.serialize import graph_text


class PassError(UserError, RuntimeError):
    """A pass that fired another number of times than the model says it must, or broke a rule."""


@dataclass
class PassRecord:
    """What one pass did. ``snapshot`` is the program after it: piece → lines, module paths."""

    name: str
    level: str
    sites: int
    expected: int | None
    milliseconds: float
    nodes: int
    snapshot: dict[str, list[tuple[str, str]]] = field(repr=False)
    error: float | None = None


def symbol_names(program: Program) -> dict[str, str]:
    """The tracer's symbols by what they count: ``{"s77": "T", ...}``."""
    known = INPUT_DIMS | {"pages": ("P",)} | IMAGE_DIMS | ENCODE_DIMS
    return {str(size): dim for name, value in program.inputs.items()
            for size, dim in zip(value.shape, known[name], strict=True) if dim in SYMBOLS}


def clean(program: Program) -> None:
    """Drop dead nodes and unused placeholders; recompile the modules."""
    for gm in program.pieces.values():
        gm.graph.eliminate_dead_code()
        for node in placeholders(gm):
            if not node.users:
                gm.graph.erase_node(node)
        gm.recompile()


def snapshot(program: Program) -> dict[str, list[tuple[str, str]]]:
    """Readable lines of every piece."""
    names = symbol_names(program)
    return {piece: graph_text(gm, names) for piece, gm in program.pieces.items()}


def is_at(program: Program, level: str, wanted: str, kernels: frozenset[str]) -> bool:
    """Whether a program at ``level`` is at the later level ``wanted`` too: all its ops are legal
    there, so that no pass had to lift it (a vision tower has no cache to page)."""
    try:
        levels.verify(program, wanted, kernels)
    except levels.LevelError:
        return False
    return levels.LEVELS.index(level) < levels.LEVELS.index(wanted)


def _unmatched(item: Pass, program: Program, ctx: PassContext) -> str:
    """The first module in which a pass should have fired and left no op of ours."""
    made = {module_of(node)[0] for gm in program.pieces.values() for node in gm.graph.nodes
            if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "xllm"}
    left = [name for name in item.modules(ctx.facts) if name not in made]
    return f"; not recognised: module {left[0]}" if left else ""


def run_pass(item: Pass, program: Program, ctx: PassContext, level: str) -> tuple[PassRecord, str]:
    """Run one pass on ``program`` in place; returns its record and the new level."""
    if level not in (item.before, item.after) and not is_at(program, level, item.before,
                                                             ctx.target.kernels):
        raise PassError(f"pass {item.name} wants level {item.before}, the program is at {level}")
    start = time.perf_counter()
    sites = item.apply(program, ctx)
    elapsed = (time.perf_counter() - start) * 1e3
    clean(program)
    levels.verify(program, item.after, ctx.target.kernels)
    expected = item.expected(ctx.facts, ctx)
    record = PassRecord(item.name, item.after, sites, expected, elapsed, program.num_nodes(),
                        snapshot(program))
    if expected is not None and sites != expected:
        raise PassError(f"pass {item.name} rewrote {sites} sites of {ctx.facts.architecture}, "
                        f"expected {expected}{_unmatched(item, program, ctx)}")
    return record, item.after


Check = Callable[[Program, Program, PassContext, Pass], float]


def run_pipeline(
    program: Program, ctx: PassContext, table: tuple[Pass, ...],
    check: Check | None = None, progress: Callable[[str], None] = lambda name: None,
) -> list[PassRecord]:
    """Run the table; ``check(before, after, ctx, pass)`` compares values and returns the error."""
    clean(program)
    levels.verify(program, "captured", ctx.target.kernels)
    first = PassRecord("capture", "captured", 1, 1, 0.0, program.num_nodes(), snapshot(program))
    records, level = [first], "captured"
    for item in table:
        progress(item.name)
        before = copy_program(program) if check else None
        record, level = run_pass(item, program, ctx, level)
        if check and record.sites:
            record.error = check(before, program, ctx, item)
        records.append(record)
    return records
