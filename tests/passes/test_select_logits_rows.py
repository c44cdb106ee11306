"""select_logits_rows: the head sees only the rows that are wanted."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from tests.passes.pass_graphs import (
    R,
    T,
    aten,
    build,
    clean,
    context,
    execute_bound,
    fake,
    program_of,
    targets,
)
from xllm.passes.select_logits_rows import select_logits_rows

ARGUMENTS = {"x": fake((1, T, 8), torch.bfloat16), "head": fake((5, 8), torch.bfloat16)}


def head(x: Tensor, head: Tensor) -> Tensor:
    return aten.linear.default(x, head)


def capped(x: Tensor, head: Tensor) -> Tensor:
    """Logits with a scale and a soft cap."""
    scaled = aten.div.Tensor(aten.linear.default(x, head), 3.0)
    return aten.mul.Tensor(aten.tanh.default(scaled), 3.0)


def select(gm: fx.GraphModule) -> int:
    """Run the pass on a program of one piece."""
    ctx = context()
    return select_logits_rows(program_of(gm, ctx), ctx)


def test_hit() -> None:
    gm, ctx = build(head, ARGUMENTS, ("head",)), context()
    program = program_of(gm, ctx)
    assert select_logits_rows(program, ctx) == 1
    assert targets(clean(gm)) == [aten.squeeze.dim, aten.index_select.default,
                                  aten.linear.default, aten.to.dtype, aten.to.dtype]
    assert program.schedule[0].outputs == ("logits", "hidden")
    (output,) = gm.graph.find_nodes(op="output")
    logits, hidden = (node.meta["val"] for node in output.args[0])
    assert (logits.dtype, logits.shape) == (torch.float32, (R, 5))
    assert (hidden.dtype, hidden.shape) == (torch.float32, (R, 8))


def test_hit_behind_a_soft_cap() -> None:
    gm = build(capped, ARGUMENTS, ("head",))
    assert select(gm) == 1
    (output,) = clean(gm).graph.find_nodes(op="output")
    assert [node.meta["val"].shape for node in output.args[0]] == [(R, 5), (R, 8)]
    assert targets(gm)[2:6] == [aten.linear.default, aten.div.Tensor, aten.tanh.default,
                                aten.mul.Tensor]


def test_miss_no_linear_at_the_end() -> None:
    def summed(x: Tensor, head: Tensor) -> Tensor:
        logits = aten.linear.default(x, head)
        return aten.mul.Tensor(logits, aten.tanh.default(logits))

    for model in (summed, lambda x, head: aten.sin.default(aten.linear.default(x, head))):
        assert select(build(model, ARGUMENTS, ("head",))) == 0


def test_second_user_of_the_logits() -> None:
    def used(x: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
        logits = aten.linear.default(x, head)
        return logits, aten.tanh.default(logits)

    gm = build(used, ARGUMENTS, ("head",))
    before = targets(gm)
    assert select(gm) == 0 and targets(gm) == before


def test_chain_a_linear_before_the_head_keeps_all_rows() -> None:
    def two(x: Tensor, head: Tensor, inner: Tensor) -> Tensor:
        return aten.linear.default(aten.linear.default(x, inner), head)

    gm = build(two, ARGUMENTS | {"inner": fake((8, 8), torch.bfloat16)}, ("head", "inner"))
    assert select(gm) == 1
    first = next(n for n in clean(gm).graph.nodes if n.target is aten.linear.default)
    assert first.meta["val"].shape == (1, T, 8)


@settings(max_examples=15, deadline=None)
@given(tokens=st.integers(1, 9), seed=st.integers(0, 10**6), data=st.data())
def test_values(tokens: int, seed: int, data: st.DataObject) -> None:
    rows = torch.tensor(data.draw(st.lists(st.integers(0, tokens - 1), min_size=1, max_size=5)))
    generator = torch.Generator().manual_seed(seed)
    values = {"x": torch.randn((1, tokens, 8), generator=generator),
              "head": torch.randn((5, 8), generator=generator), "logits_rows": rows}
    for model in (head, capped):
        gm = build(model, {"x": fake((1, T, 8)), "head": fake((5, 8))}, ("head",))
        (want,) = execute_bound(gm, values)
        select(gm)
        got, hidden = execute_bound(clean(gm), values)
        torch.testing.assert_close(got, want[0, rows], rtol=1e-6, atol=1e-6)
        assert torch.equal(hidden, values["x"][0, rows])
