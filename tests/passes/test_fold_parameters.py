"""fold_parameters: what depends on parameters only becomes a parameter."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.passes.pass_graphs import T, aten, build, context, fake
from xllm.graph import Weight, placeholders
from xllm.passes.fold_parameters import fold_parameters
from xllm.weights import Add, Cast, Leaf, Transpose, evaluate


def gemma(x: Tensor, w: Tensor) -> Tensor:
    return aten.mul.Tensor(x, aten.add.Tensor(aten.to.dtype(w, torch.float32), 1.0))


def run(function: object, dtype: torch.dtype, *shape: int) -> tuple[object, int]:
    """The pass on ``function(x, w)`` with a parameter w."""
    gm = build(function, {"x": fake((1, T, 8)), "w": fake(shape, dtype)}, weights=("w",))
    return gm, fold_parameters(gm, context())


def recipes(gm: object) -> list[object]:
    """Recipes of the parameters that somebody reads."""
    return [n.meta["bind"].recipe for n in placeholders(gm, Weight) if n.users]


def test_one_plus_weight() -> None:
    gm, sites = run(gemma, torch.bfloat16, 8)
    (recipe,) = recipes(gm)
    assert sites == 2
    assert recipe == Add(Cast(Cast(Leaf("w.weight"), "bfloat16"), "float32"), 1.0)
    stored = torch.randn(8)  # the file has more digits than the model
    assert torch.equal(evaluate(recipe, {"w.weight": stored}.__getitem__),
                       stored.bfloat16().float() + 1)
    assert not any(node.target in (aten.to.dtype, aten.add.Tensor) for node in gm.graph.nodes)


def test_transposed() -> None:
    gm, sites = run(lambda x, w: aten.matmul.default(x, aten.transpose.int(w, 0, 1)),
                    torch.float32, 5, 8)
    assert sites == 1 and recipes(gm) == [Transpose(Cast(Leaf("w.weight"), "float32"), 0, 1)]


def test_a_second_user_keeps_the_parameter() -> None:
    gm, sites = run(lambda x, w: aten.add.Tensor(gemma(x, w), w), torch.float32, 8)
    assert sites == 2 and len(recipes(gm)) == 2


def test_what_depends_on_tokens_stays() -> None:
    gm, sites = run(lambda x, w: aten.add.Tensor(w, x), torch.float32, 8)
    assert sites == 0 and recipes(gm) == [Leaf("w.weight")]
    gm, sites = run(lambda x, w: aten.mul.Tensor(aten.to.dtype(x, torch.bfloat16), w),
                    torch.float32, 8)
    assert sites == 0
