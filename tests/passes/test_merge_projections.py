"""merge_projections: linears over one input become one, their weights a recipe."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from tests.passes.pass_graphs import (
    T,
    aten,
    build,
    clean,
    context,
    execute_bound,
    fake,
    targets,
)
from xllm.graph import Weight, placeholders
from xllm.passes.merge_projections import merge_projections
from xllm.weights import Concat, Leaf

linear = aten.linear.default
WEIGHTS = ("a", "b", "c", "bias_a", "bias_b")


def graph(function: object, **more: Tensor) -> fx.GraphModule:
    """Over ``x [1, T, 8]`` and weights ``a [4, 8]``, ``b [6, 8]``."""
    arguments = {"x": fake((1, T, 8)), "a": fake((4, 8)), "b": fake((6, 8)), **more}
    return build(function, arguments, WEIGHTS)


def test_hit() -> None:
    gm = graph(lambda x, a, b: (linear(x, a), linear(x, b)))
    assert merge_projections(gm, context()) == 1
    assert targets(clean(gm)) == [linear, aten.slice.Tensor, aten.slice.Tensor]
    merged = next(n for n in gm.graph.nodes if n.target is linear).args[1]
    assert merged.meta["bind"] == Weight(Concat((Leaf("a.weight"), Leaf("b.weight"))))
    assert merged.meta["val"].shape == (10, 8)


def test_biases_are_merged_too() -> None:
    gm = graph(lambda x, a, b, bias_a, bias_b: (linear(x, a, bias_a), linear(x, b, bias_b)),
               bias_a=fake((4,)), bias_b=fake((6,)))
    assert merge_projections(gm, context()) == 1
    recipes = [n.meta["bind"].recipe for n in placeholders(clean(gm), Weight) if n.users]
    assert Concat((Leaf("bias_a.weight"), Leaf("bias_b.weight"))) in recipes


@pytest.mark.parametrize("function", [
    lambda x, a, b: linear(x, a),
    lambda x, a, b: (linear(x, a), linear(aten.neg.default(x), b)),
    lambda x, a, b: (linear(x, a), aten.matmul.default(x, aten.t.default(b))),
    lambda x, a, b: (linear(x, a), linear(x, aten.neg.default(b))),
], ids=["alone", "another input", "another op", "no parameter"])
def test_miss(function: object) -> None:
    gm = graph(function)
    before = targets(gm)
    assert merge_projections(gm, context()) == 0 and targets(clean(gm)) == before


def test_miss_one_has_a_bias_or_another_dtype() -> None:
    gm = graph(lambda x, a, b, bias_a: (linear(x, a, bias_a), linear(x, b)), bias_a=fake((4,)))
    assert merge_projections(gm, context()) == 0


def test_second_user_of_a_weight() -> None:
    """A parameter that somebody else reads stays as it is."""
    gm = graph(lambda x, a, b: (linear(x, a), linear(x, b), aten.neg.default(a)))
    assert merge_projections(gm, context()) == 0


def test_second_user_of_a_result() -> None:
    def used(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        first = linear(x, a)
        return first, aten.exp.default(first), linear(x, b)

    assert merge_projections(graph(used), context()) == 1


@settings(max_examples=15, deadline=None)
@given(tokens=st.integers(1, 9), seed=st.integers(0, 10**6),
       dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_chain_and_values(tokens: int, seed: int, dtype: torch.dtype) -> None:
    """Two groups, the second over a result of the first."""
    def two(x: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        first, second = linear(x, a), linear(x, b)
        return second, linear(first, c), linear(first, d)

    arguments = {"x": fake((1, T, 8), dtype), "a": fake((4, 8), dtype), "b": fake((6, 8), dtype),
                 "c": fake((3, 4), dtype), "d": fake((5, 4), dtype)}
    gm = build(two, arguments, ("a", "b", "c", "d"))
    generator = torch.Generator().manual_seed(seed)
    values = {n: torch.randn([tokens if d == T else d for d in v.shape], generator=generator)
              .to(dtype) for n, v in arguments.items()}
    want = execute_bound(gm, values)
    assert merge_projections(gm, context()) == 2
    for got, expected in zip(execute_bound(clean(gm), values), want, strict=True):
        bound = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
        torch.testing.assert_close(got, expected, rtol=bound, atol=bound)
