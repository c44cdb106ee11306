"""Every rule, broken once in every way: the test that guards against it must fail.

``pytest -s tests/passes/test_mutants.py`` prints the tally.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.passes.pass_graphs import aten
from tests.passes.rule_checks import (
    call_nodes,
    check_hit,
    check_mutation,
    check_refused,
    check_second_user,
    check_type_guard,
    check_values,
    fakes,
    graph,
    results,
)
from tests.passes.rule_table import TABLE, Entry
from xllm.passes import rewrite
from xllm.passes.rewrite import Rewrite

Check = Callable[[Entry, torch.dtype], None]
#: What is broken, the broken entry, the monkeypatch that breaks a guard, and the check to fail.
Mutant = tuple[str, Entry, AbstractContextManager, Check]


def several_values(entry: Entry, dtype: torch.dtype) -> None:
    """The value property on a few draws."""
    for seed in range(4):
        check_values(entry, dtype, seed)


def with_after(entry: Entry, change: Callable[..., object]) -> Entry:
    """The entry with ``change(after, arguments)`` for ``after``."""
    rule = entry.rule

    def broken(**arguments: object) -> object:
        return change(rule.after, arguments)

    return replace(entry, rule=Rewrite(rule.before, broken, rule.when))


def swaps(entry: Entry, dtype: torch.dtype) -> Iterator[Mutant]:
    """Two tensors mixed up in ``after``."""
    names = sorted(n for n, v in fakes(entry, dtype).items() if isinstance(v, Tensor))
    for a, b in itertools.combinations(names, 2):
        if (a, b) not in entry.symmetric:
            def change(after: Callable, given: dict, a: str = a, b: str = b) -> object:
                return after(**given | {a: given[b], b: given[a]})

            yield f"swap {a}, {b}", with_after(entry, change), nullcontext(), several_values


def numbers(entry: Entry, dtype: torch.dtype) -> Iterator[Mutant]:
    """Another epsilon, and a constant 0 instead of it."""
    if "eps" in fakes(entry, dtype):
        for what, eps in (("eps + 0.5", lambda e: e + 0.5), ("no eps", lambda e: 0.0)):
            def change(after: Callable, given: dict, eps: Callable = eps) -> object:
                return after(**given | {"eps": eps(given["eps"])})

            yield what, with_after(entry, change), nullcontext(), several_values


def types(entry: Entry, dtype: torch.dtype) -> Iterator[Mutant]:
    """A result of the wrong dtype: the pass then no longer fires."""
    def change(after: Callable, given: dict) -> object:
        first, *rest = results(after(**given))
        return (aten.to.dtype(first, torch.float16), *rest)

    yield "wrong dtype", with_after(entry, change), nullcontext(), check_hit


def rounded(entry: Entry, dtype: torch.dtype) -> Iterator[Mutant]:
    """The right type, but a value that went through a narrower one."""
    def change(after: Callable, given: dict) -> object:
        first, *rest = results(after(**given))
        narrow = aten.to.dtype(first, torch.float8_e4m3fn)
        return (aten.to.dtype(narrow, dtype), *rest)

    yield "rounds twice", with_after(entry, change), nullcontext(), several_values


def effects(entry: Entry, dtype: torch.dtype) -> Iterator[Mutant]:
    """The KV write goes to a copy."""
    if "kv_cache" in fakes(entry, dtype):
        def change(after: Callable, given: dict) -> object:
            return after(**given | {"kv_cache": aten.clone.default(given["kv_cache"])})

        yield "no write", with_after(entry, change), nullcontext(), several_values


def guards(entry: Entry, dtype: torch.dtype) -> Iterator[Mutant]:
    """A guard of the matcher skipped."""
    def patched(owner: object, name: str) -> AbstractContextManager:
        patch = pytest.MonkeyPatch()
        patch.setattr(owner, name, lambda *_: True)
        return _Undo(patch)

    if entry.rule.when is not Rewrite.when:
        without_when = replace(entry, rule=Rewrite(entry.rule.before, entry.rule.after))
        yield "no ``when``", without_when, nullcontext(), check_refused
    if len(entry.rule.outputs) < len(call_nodes(graph(entry, dtype))):  # there are inner nodes
        yield "no second-user guard", entry, patched(Rewrite, "_alone"), check_second_user
    yield "no mutation guard", entry, patched(rewrite, "_undisturbed"), check_mutation
    yield "no type guard", entry, patched(rewrite, "same_type"), check_type_guard


class _Undo(AbstractContextManager):
    """Undoes a monkeypatch at the end of the block."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch

    def __exit__(self, *error: object) -> None:
        self.patch.undo()


def caught(mutant: Mutant, dtype: torch.dtype) -> bool:
    """Whether the mutant's check fails."""
    _, entry, broken, check = mutant
    with broken:
        try:
            check(entry, dtype)
        except Exception:  # any failure of the check is what we are after
            return True
    return False


@pytest.mark.parametrize("name", TABLE)
def test_mutants(name: str) -> None:
    entry = TABLE[name]
    dtype = entry.dtypes[-1]
    survivors, tried = [], 0
    for kind in (swaps, numbers, types, rounded, effects, guards):
        for mutant in kind(entry, dtype):
            tried += 1
            if not caught(mutant, dtype):
                survivors.append(mutant[0])
    print(f"{name}: {tried - len(survivors)} of {tried} mutants caught")
    assert not survivors


@pytest.mark.parametrize("name", TABLE)
def test_the_unbroken_rule_passes(name: str) -> None:
    """The same checks hold without a mutation, or the tally would say nothing."""
    for check in (several_values, check_hit, check_refused, check_type_guard):
        check(TABLE[name], TABLE[name].dtypes[-1])
