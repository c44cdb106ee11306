"""pack_linear: weights of linears, and a tied embedding, in the packed layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from tests.passes.pass_graphs import (
    FACTS,
    T,
    aten,
    build,
    clean,
    context,
    execute_bound,
    fake,
    targets,
    xllm,
)
from xllm.graph import Weight, placeholders
from xllm.passes.pack_linear import expected, pack_linear
from xllm.weights import Leaf, Pack

BF16 = torch.bfloat16
TIED = replace(FACTS, tied_embeddings=True)
linear, packed = aten.linear.default, xllm.packed_linear.default


def graph(function: object, rows: int = 40, width: int = 8, dtype: torch.dtype = BF16
          ) -> fx.GraphModule:
    """Over ``x``, weight ``w``, square weight ``s``, ``bias`` and token ``ids``."""
    arguments = {"x": fake((1, T, width), dtype), "w": fake((rows, width), dtype),
                 "s": fake((width, width), dtype), "bias": fake((rows,), dtype),
                 "ids": fake((1, T), torch.int64)}
    return build(function, arguments, ("w", "s", "bias"))


def test_hit() -> None:
    gm = graph(lambda x, w, s, bias, ids: linear(x, w, bias))
    assert pack_linear(gm, context(BF16)) == 1
    (node,) = (n for n in clean(gm).graph.nodes if n.op == "call_function")
    assert node.target is packed and node.args[3] == 40
    assert node.args[1].meta["bind"] == Weight(Pack(Leaf("w.weight")))
    assert node.args[1].meta["val"].shape == (2, 4, 32, 2)
    assert node.meta["val"].shape == (1, T, 40)


@pytest.mark.parametrize(("function", "options"), [
    (lambda x, w, s, bias, ids: linear(x, w), {"dtype": torch.float32}),
    (lambda x, w, s, bias, ids: linear(x, w), {"width": 7}),
    (lambda x, w, s, bias, ids: linear(x, aten.neg.default(w)), {}),
    (lambda x, w, s, bias, ids: aten.embedding.default(w, ids), {}),
], ids=["dtype", "odd width", "no parameter", "untied embedding"])
def test_miss(function: object, options: dict[str, object]) -> None:
    gm = graph(function, **options)
    before = targets(gm)
    assert pack_linear(gm, context(BF16)) == 0 and targets(clean(gm)) == before


def test_second_user_shares_the_packed_weight() -> None:
    """A tied head: embedding and head read one packed parameter."""
    gm = graph(lambda x, w, s, bias, ids: linear(aten.embedding.default(w, ids), w))
    assert pack_linear(gm, context(BF16, TIED)) == 1
    assert targets(clean(gm)) == [xllm.packed_embedding.default, packed]
    assert sum(n.meta["bind"] == Weight(Pack(Leaf("w.weight")))
               for n in placeholders(gm, Weight)) == 1


def test_second_user_that_is_no_linear_keeps_the_plain_weight() -> None:
    gm = graph(lambda x, w, s, bias, ids: (linear(x, w), aten.neg.default(w)))
    assert pack_linear(gm, context(BF16)) == 1
    assert targets(clean(gm)) == [packed, aten.neg.default]


def test_expected_follows_dtype_and_width() -> None:
    assert expected(FACTS, context(torch.float32)) == 0
    assert expected(replace(FACTS, hidden_size=33, num_even_linears=2), context(BF16)) == 2
    assert expected(replace(FACTS, num_even_linears=8), context(BF16)) == 5


@settings(max_examples=15, deadline=None)
@given(tokens=st.integers(1, 9), rows=st.sampled_from([1, 32, 40]), seed=st.integers(0, 10**6))
def test_chain_and_values(tokens: int, rows: int, seed: int) -> None:
    def chain(x: Tensor, w: Tensor, s: Tensor, bias: Tensor, ids: Tensor) -> Tensor:
        inner = aten.add.Tensor(linear(x, s), aten.embedding.default(w, ids))
        return linear(inner, w, bias)

    generator = torch.Generator().manual_seed(seed)
    shapes = {"x": (1, tokens, 8), "w": (rows, 8), "s": (8, 8), "bias": (rows,)}
    values = {n: torch.randn(s, generator=generator).to(BF16) for n, s in shapes.items()}
    values["ids"] = torch.randint(rows, (1, tokens), generator=generator)
    gm = graph(chain, rows)
    (want,) = execute_bound(gm, values)
    assert pack_linear(gm, context(BF16, TIED)) == 2
    (got,) = execute_bound(clean(gm), values)
    torch.testing.assert_close(got, want, rtol=3e-2, atol=3e-2)
