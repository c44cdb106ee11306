"""lower: ops without a kernel become their reference; the others stay."""

from __future__ import annotations

import operator
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.passes.pass_graphs import (
    P,
    T,
    assert_equal,
    aten,
    build,
    clean,
    context,
    execute,
    fake,
    targets,
    xllm,
)
from xllm.graph import placeholders
from xllm.passes.lower import lower

X, W = fake((1, T, 8)), fake((8,))


def norm(x: Tensor, w: Tensor) -> Tensor:
    return xllm.rms_norm.default(x, w, 1e-5)


def test_hit() -> None:
    gm = build(norm, {"x": X, "w": W})
    binds = [(n.name, n.meta["bind"]) for n in placeholders(gm)]
    assert lower(gm, context()) == 1
    assert aten.rsqrt.default in targets(clean(gm))
    assert not any(str(t).startswith("xllm") for t in targets(gm))
    assert [(n.name, n.meta["bind"]) for n in placeholders(gm)] == binds


def test_miss_what_the_target_has_a_kernel_for() -> None:
    cache, slots = fake((P, 2, 2, 4, 8)), fake((T,), torch.int64)

    def write(k: Tensor, cache: Tensor, slots: Tensor) -> Tensor:
        xllm.kv_write.default(k, k, cache, slots)
        return aten.neg.default(k)

    gm = build(write, {"k": fake((T, 2, 8)), "cache": cache, "slots": slots})
    assert lower(gm, context()) == 0
    assert targets(clean(gm)) == [xllm.kv_write.default, aten.neg.default]


def test_second_users_and_chain() -> None:
    def twice(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        first = norm(x, w)
        return norm(first, w), aten.neg.default(first)

    gm = build(twice, {"x": X, "w": W})
    assert lower(gm, context()) == 2
    assert targets(clean(gm)).count(aten.rsqrt.default) == 2


def test_sizes_stay_symbolic() -> None:
    gm = build(lambda x, c, s: xllm.rope.default(x, c, s), {
        "x": fake((1, T, 2, 8)), "c": fake((1, T, 8)), "s": fake((1, T, 8))})
    lower(gm, context())
    out = next(n for n in clean(gm).graph.nodes if n.op == "output").args[0][0]
    assert out.meta["val"].shape == (1, T, 2, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_values(dtype: torch.dtype, seed: int) -> None:
    """To the bit: a reference is its op's meaning."""
    def layer(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        both = xllm.add_rms_norm.default(x, residual, w, 1e-5)
        y, total = operator.getitem(both, 0), operator.getitem(both, 1)
        return xllm.silu_mul.default(y, total), total

    generator = torch.Generator().manual_seed(seed)
    tokens = random.Random(seed).choice([1, 2, 9])
    shapes = {"x": (1, tokens, 8), "residual": (1, tokens, 8), "w": (8,)}
    values = {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}
    gm = build(layer, {"x": fake((1, T, 8), dtype), "residual": fake((1, T, 8), dtype),
                       "w": fake((8,), dtype)})
    want = execute(gm, values)
    assert lower(gm, context(dtype)) == 2
    assert_equal(execute(clean(gm), values), want)
