"""cse: equal computations become one; writes and random numbers stay apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.passes.pass_graphs import (
    T,
    assert_equal,
    aten,
    build,
    clean,
    context,
    execute,
    fake,
    targets,
)
from xllm.passes.cse import cse

X = fake((1, T, 8))


def sites(function: Callable[..., object], **arguments: object) -> int:
    """Sites of the pass in the graph of a function of ``x``."""
    gm = build(function, {"x": X, **arguments})
    count = cse(gm, context())
    clean(gm)
    return count


def test_hit() -> None:
    gm = build(lambda x: aten.add.Tensor(aten.neg.default(x), aten.neg.default(x)), {"x": X})
    assert cse(gm, context()) == 1
    add = list(clean(gm).graph.nodes)[-2]
    assert targets(gm) == [aten.neg.default, aten.add.Tensor] and add.args[0] is add.args[1]


def test_defaults_are_filled_in() -> None:
    assert sites(lambda x: (aten.slice.Tensor(x, 1), aten.slice.Tensor(x, 1, None, None, 1))) == 1


MISSES = {
    "argument": lambda x: (aten.unsqueeze.default(x, 0), aten.unsqueeze.default(x, 1)),
    "literal type": lambda x: (aten.mul.Tensor(x, 1), aten.mul.Tensor(x, 1.0)),
    "bool is no int": lambda x: (aten.mul.Tensor(x, 1), aten.mul.Tensor(x, True)),
    "op": lambda x: (aten.neg.default(x), aten.abs.default(x)),
    "order": lambda x: (aten.sub.Tensor(x, 1), aten.rsub.Scalar(x, 1)),
    "random": lambda x: (aten.rand_like.default(x), aten.rand_like.default(x)),
}


@pytest.mark.parametrize("name", MISSES)
def test_miss(name: str) -> None:
    assert sites(MISSES[name]) == 0


def test_second_users_move_to_the_first() -> None:
    def twice(x: Tensor) -> tuple[Tensor, ...]:
        a, b = aten.neg.default(x), aten.neg.default(x)
        return aten.exp.default(a), aten.abs.default(b), b

    gm = build(twice, {"x": X})
    assert cse(gm, context()) == 1
    assert targets(clean(gm)) == [aten.neg.default, aten.exp.default, aten.abs.default]


def test_chain() -> None:
    def chain(x: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(aten.exp.default(aten.neg.default(x)) for _ in range(2))

    assert sites(chain) == 2


def test_a_write_between_keeps_both() -> None:
    def read_write_read(x: Tensor) -> tuple[Tensor, Tensor]:
        before = aten.neg.default(x)
        aten.zero_.default(x)
        return before, aten.neg.default(x)

    assert sites(read_write_read) == 0


def test_two_buffers_stay_two() -> None:
    """Equal copies, of which one is written to."""
    def copies(x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = aten.clone.default(x), aten.clone.default(x)
        aten.zero_.default(b)
        return aten.neg.default(a), aten.neg.default(b)

    assert sites(copies) == 0


@settings(max_examples=25, deadline=None)
@given(picks=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9), st.integers(0, 9)),
                      min_size=1, max_size=8))
def test_values(picks: list[tuple[int, int, int]]) -> None:
    """Random graphs of three ops over earlier values."""
    ops = [aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor]

    def grown(x: Tensor) -> tuple[Tensor, ...]:
        values = [x]
        for op, a, b in picks:
            values.append(ops[op](values[a % len(values)], values[b % len(values)]))
        return tuple(values[1:])

    gm = build(grown, {"x": X})
    value = {"x": torch.randn(1, 3, 8)}
    want = execute(gm, value)
    count = cse(gm, context())
    assert count == len(picks) - len(targets(gm))
    assert_equal(execute(clean(gm), value), want)
