"""static_views: sizes that travel become -1 or literals."""

from __future__ import annotations

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
)
from xllm.passes.static_views import static_views


def heads(x: Tensor) -> Tensor:
    return aten.view.default(x, [1, aten.sym_size.int(x, 1), -1, 4])


def test_hit() -> None:
    gm = build(heads, {"x": fake((1, T, 8))})
    assert static_views(gm, context()) == 1
    (view,) = (n for n in clean(gm).graph.nodes if n.op == "call_function")
    assert view.args[1] == [1, -1, 2, 4]


def test_miss_already_literal_or_two_symbols() -> None:
    for shape, view in (((1, T, 8), [1, -1, 2, 4]), ((2, 3, 8), [6, 8])):
        assert static_views(build(lambda x, s: aten.view.default(x, s),
                                  {"x": fake(shape), "s": view}), context()) == 0
    two = build(lambda x: aten.view.default(x, [aten.sym_size.int(x, 0), -1, 2, 4]),
                {"x": fake((P, T, 8))})
    assert static_views(two, context()) == 0
    assert targets(clean(two)) == [aten.sym_size.int, aten.view.default]


def test_second_user_keeps_the_size() -> None:
    def used(x: Tensor) -> tuple[Tensor, Tensor]:
        size = aten.sym_size.int(x, 1)
        return aten.view.default(x, [1, size, 2, 4]), aten.arange.default(size)

    gm = build(used, {"x": fake((1, T, 8))})
    assert static_views(gm, context()) == 1
    assert aten.sym_size.int in targets(clean(gm))


@settings(max_examples=10, deadline=None)
@given(tokens=st.integers(1, 6), groups=st.sampled_from([1, 2, 4]))
def test_chain_and_values(tokens: int, groups: int) -> None:
    def there_and_back(x: Tensor) -> Tensor:
        size = aten.sym_size.int(x, 1)
        split = aten.view.default(x, [1, size, groups, -1])
        return aten.reshape.default(aten.transpose.int(split, 1, 2), [1, size, -1])

    gm = build(there_and_back, {"x": fake((1, T, 8))})
    value = {"x": torch.randn(1, tokens, 8)}
    want = execute(gm, value)
    assert static_views(gm, context()) == 2
    assert_equal(execute(clean(gm), value), want)
