"""drop_noops: what is dropped, what only looks like nothing, and values."""

from __future__ import annotations

import random
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
from xllm.passes.drop_noops import drop_noops

END = 2**63 - 1
NOOPS: dict[str, Callable[[Tensor], Tensor]] = {
    "to": lambda x: aten.to.dtype(x, torch.float32),
    "slice": lambda x: aten.slice.Tensor(x, 1, 0, END),
    "view": lambda x: aten.view.default(x, [1, -1, 8]),
    "expand": lambda x: aten.expand.default(x, [-1, -1, 8]),
    "contiguous": lambda x: aten.contiguous.default(x),
    "clone": lambda x: aten.clone.default(x),
    "detach": lambda x: aten.detach.default(x),
    "alias": lambda x: aten.alias.default(x),
    "mul 1": lambda x: aten.mul.Tensor(x, 1.0),
    "div 1": lambda x: aten.div.Tensor(x, 1),
    "add 0": lambda x: aten.add.Tensor(x, 0),
    "sub 0": lambda x: aten.sub.Tensor(x, 0.0),
    "dropout": lambda x: aten.dropout.default(x, 0.5, False),
    "dropout 0": lambda x: aten.dropout.default(x, 0.0, True),
}
PAIRS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposes": lambda x: aten.transpose.int(aten.transpose.int(x, 1, 2), 2, 1),
    "unsqueeze, squeeze": lambda x: aten.squeeze.dim(aten.unsqueeze.default(x, 1), 1),
    "squeeze, unsqueeze": lambda x: aten.unsqueeze.default(aten.squeeze.dim(x, 0), 0),
}
MISSES: dict[str, Callable[[Tensor], Tensor]] = {
    "to": lambda x: aten.to.dtype(x, torch.bfloat16),
    "slice": lambda x: aten.slice.Tensor(x, 2, 0, 7),
    "every second": lambda x: aten.slice.Tensor(x, 2, 0, END, 2),
    "view": lambda x: aten.view.default(x, [-1, 8]),
    "mul": lambda x: aten.mul.Tensor(x, 2),
    "mul 0": lambda x: aten.mul.Tensor(x, 0),
    "add 1": lambda x: aten.add.Tensor(x, 1),
    "div 0": lambda x: aten.div.Tensor(x, 0),
    "dropout": lambda x: aten.dropout.default(x, 0.5, True),
    "transposes": lambda x: aten.transpose.int(aten.transpose.int(x, 1, 2), 0, 1),
    "squeeze": lambda x: aten.squeeze.dim(aten.unsqueeze.default(x, 1), 0),
}


def run(function: Callable[..., object], x: Tensor | None = None) -> tuple[int, list[object]]:
    """Sites, and the targets left."""
    gm = build(function, {"x": fake((1, T, 8)) if x is None else x})
    sites = drop_noops(gm, context())
    return sites, targets(clean(gm))


@pytest.mark.parametrize("name", NOOPS)
def test_hit(name: str) -> None:
    assert run(NOOPS[name]) == (1, [])


@pytest.mark.parametrize("name", PAIRS)
def test_hit_inverse_pairs(name: str) -> None:
    assert run(PAIRS[name]) == (1, [])


@pytest.mark.parametrize("name", MISSES)
def test_miss(name: str) -> None:
    sites, left = run(MISSES[name])
    assert sites == 0 and left


def test_miss_a_product_that_promotes() -> None:
    assert run(lambda x: aten.mul.Tensor(x, 1.0), fake((1, T), torch.int64))[0] == 0


def test_checks_are_erased() -> None:
    def checked(x: Tensor) -> Tensor:
        aten._assert_tensor_metadata.default(x, None, None, torch.float32)
        return aten.neg.default(x)

    assert run(checked) == (1, [aten.neg.default])


def test_second_user_of_the_inner_of_a_pair() -> None:
    def used_twice(x: Tensor) -> tuple[Tensor, Tensor]:
        inner = aten.transpose.int(x, 1, 2)
        return aten.transpose.int(inner, 1, 2), inner

    assert run(used_twice) == (1, [aten.transpose.int])


def test_chain() -> None:
    def chain(x: Tensor) -> Tensor:
        for noop in NOOPS.values():
            x = noop(x)
        return PAIRS["transposes"](aten.neg.default(x))

    assert run(chain) == (len(NOOPS) + 1, [aten.neg.default])


def test_a_copy_that_a_view_needs_stays() -> None:
    def merged_heads(x: Tensor) -> Tensor:
        swapped = aten.transpose.int(x, 1, 2)
        return aten.view.default(aten.contiguous.default(swapped), [1, -1])

    gm = build(merged_heads, {"x": fake((1, T, 8))})
    assert drop_noops(gm, context()) == 0
    value = torch.randn(1, 3, 8)
    assert_equal(execute(clean(gm), {"x": value})[:1], [value.transpose(1, 2).reshape(1, -1)])


@pytest.mark.parametrize("copied_first", [True, False])
def test_a_copy_that_somebody_writes_to_stays(copied_first: bool) -> None:
    def write(x: Tensor) -> tuple[Tensor, Tensor]:
        copy = aten.clone.default(x)
        aten.zero_.default(copy if copied_first else x)
        return aten.neg.default(x), aten.neg.default(copy)

    gm = build(write, {"x": fake((1, T, 8))})
    value = {"x": torch.randn(1, 3, 8)}
    want = execute(gm, value)
    drop_noops(gm, context())
    assert_equal(execute(clean(gm), value), want)


@settings(max_examples=25, deadline=None)
@given(names=st.lists(st.sampled_from([*NOOPS, *PAIRS, "neg"]), max_size=6),
       seed=st.integers(0, 10**6))
def test_values(names: list[str], seed: int) -> None:
    ops = NOOPS | PAIRS | {"neg": lambda x: aten.neg.default(x)}

    def stacked(x: Tensor) -> Tensor:
        for name in names:
            x = ops[name](x)
        return aten.exp.default(x)

    gm = build(stacked, {"x": fake((1, T, 8))})
    value = {"x": torch.randn(1, random.Random(seed).choice([1, 2, 5]), 8)}
    want = execute(gm, value)
    assert drop_noops(gm, context()) == len([n for n in names if n != "neg"])
    assert_equal(execute(clean(gm), value), want)
