"""The matcher's guard against writes between matched nodes, and effects as outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.passes.pass_graphs import P, T, aten, build, clean, fake, targets, xllm
from tests.passes.test_rewrite import REPLACED, RULE, X, exp_of_neg, reciprocal_of_exp, sites
from xllm.passes.rewrite import Rewrite, apply

CACHE, SLOTS = fake((P, 2, 2, 4, 8)), fake((T,), torch.int64)
KEYS = fake((T, 2, 8))


def test_write_between_to_a_touched_tensor() -> None:
    def between(x: Tensor, keys: Tensor, slots: Tensor) -> Tensor:
        inner = aten.neg.default(x)
        xllm.kv_write.default(keys, keys, x, slots)
        return aten.exp.default(inner)

    assert sites(RULE, between, x=CACHE, keys=KEYS, slots=SLOTS) == 0


def test_write_between_to_an_unrelated_tensor() -> None:
    def between(x: Tensor, cache: Tensor, keys: Tensor, slots: Tensor) -> Tensor:
        inner = aten.neg.default(x)
        xllm.kv_write.default(keys, keys, cache, slots)
        return aten.exp.default(inner)

    assert sites(RULE, between, x=X, cache=CACHE, keys=KEYS, slots=SLOTS) == 1


def test_write_before_or_behind_the_match() -> None:
    def around(x: Tensor, keys: Tensor, slots: Tensor) -> Tensor:
        xllm.kv_write.default(keys, keys, x, slots)
        out = exp_of_neg(x)
        xllm.kv_write.default(keys, keys, x, slots)
        return out

    gm = build(around, {"x": CACHE, "keys": KEYS, "slots": SLOTS})
    assert apply((RULE,), gm) == 1
    write = xllm.kv_write.default
    assert targets(clean(gm)) == [write, *REPLACED, write]


def test_write_between_through_a_view() -> None:
    def between(x: Tensor) -> Tensor:
        inner = aten.neg.default(x)
        aten.zero_.default(aten.slice.Tensor(x, 2, 0, 4))
        return aten.exp.default(inner)

    assert sites(RULE, between, x=X) == 0


def write_twice(k: Tensor, x: Tensor, cache: Tensor, slots: Tensor) -> Tensor:
    xllm.kv_write.default(k, k, cache, slots)
    return exp_of_neg(x)


def fused_write(k: Tensor, x: Tensor, cache: Tensor, slots: Tensor) -> Tensor:
    xllm.kv_write.default(k, k, cache, slots)
    return reciprocal_of_exp(x)


EFFECT = Rewrite(write_twice, fused_write)
WRITTEN = {"k": KEYS, "x": X, "cache": CACHE, "slots": SLOTS}


def test_effects_are_outputs_of_the_pattern() -> None:
    gm = build(write_twice, WRITTEN)
    assert apply((EFFECT,), gm) == 1
    assert targets(clean(gm)) == [xllm.kv_write.default, *REPLACED]
    assert sites(EFFECT, lambda k, x, cache, slots: exp_of_neg(x), **WRITTEN) == 0


def test_read_between_of_what_the_match_writes() -> None:
    """The replacement would write behind a reader that must see the write."""
    def between(k: Tensor, x: Tensor, cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        xllm.kv_write.default(k, k, cache, slots)
        return aten.neg.default(cache), exp_of_neg(x)

    assert sites(EFFECT, between, **WRITTEN) == 0


def test_read_between_through_a_view_of_what_the_match_writes() -> None:
    def between(k: Tensor, x: Tensor, cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        half = aten.slice.Tensor(cache, 1, 0, 1)
        xllm.kv_write.default(k, k, cache, slots)
        return aten.neg.default(half), exp_of_neg(x)

    assert sites(EFFECT, between, **WRITTEN) == 0
