"""select_logits_rows: the head sees only the rows that are wanted."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.passes.pass_graphs import (
    R,
    T,
    aten,
    build,
    clean,
    context,
    execute_bound,
    fake,
    targets,
)
from xllm.passes.select_logits_rows import select_logits_rows

ARGUMENTS = {"x": fake((1, T, 8), torch.bfloat16), "head": fake((5, 8), torch.bfloat16)}


def head(x: Tensor, head: Tensor) -> Tensor:
    return aten.linear.default(x, head)


def test_hit() -> None:
    gm = build(head, ARGUMENTS, ("head",))
    assert select_logits_rows(gm, context()) == 1
    assert targets(clean(gm)) == [aten.squeeze.dim, aten.index_select.default,
                                  aten.linear.default, aten.to.dtype]
    logits = next(n for n in gm.graph.nodes if n.op == "output").args[0][0].meta["val"]
    assert (logits.dtype, logits.shape) == (torch.float32, (R, 5))


def test_miss_no_linear_at_the_end() -> None:
    gm = build(lambda x, head: aten.tanh.default(aten.linear.default(x, head)), ARGUMENTS,
               ("head",))
    assert select_logits_rows(gm, context()) == 0


def test_second_user_of_the_logits() -> None:
    def used(x: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
        logits = aten.linear.default(x, head)
        return logits, aten.tanh.default(logits)

    gm = build(used, ARGUMENTS, ("head",))
    before = targets(gm)
    assert select_logits_rows(gm, context()) == 0 and targets(gm) == before


def test_chain_a_linear_before_the_head_keeps_all_rows() -> None:
    def two(x: Tensor, head: Tensor, inner: Tensor) -> Tensor:
        return aten.linear.default(aten.linear.default(x, inner), head)

    gm = build(two, ARGUMENTS | {"inner": fake((8, 8), torch.bfloat16)}, ("head", "inner"))
    assert select_logits_rows(gm, context()) == 1
    first = next(n for n in clean(gm).graph.nodes if n.target is aten.linear.default)
    assert first.meta["val"].shape == (1, T, 8)


@settings(max_examples=15, deadline=None)
@given(tokens=st.integers(1, 9), seed=st.integers(0, 10**6), data=st.data())
def test_values(tokens: int, seed: int, data: st.DataObject) -> None:
    rows = torch.tensor(data.draw(st.lists(st.integers(0, tokens - 1), min_size=1, max_size=5)))
    generator = torch.Generator().manual_seed(seed)
    values = {"x": torch.randn((1, tokens, 8), generator=generator),
              "head": torch.randn((5, 8), generator=generator), "logits_rows": rows}
    gm = build(head, {"x": fake((1, T, 8)), "head": fake((5, 8))}, ("head",))
    (want,) = execute_bound(gm, values)
    select_logits_rows(gm, context())
    (got,) = execute_bound(clean(gm), values)
    torch.testing.assert_close(got, want[0, rows], rtol=1e-6, atol=1e-6)
