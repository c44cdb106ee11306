"""Compute once, while loading, what depends on parameters only.

    %f = aten.to.dtype(%weight, torch.float32); %w = aten.add(%f, 1)
    ->   %w = parameter Add(Cast(weight, float32), 1)

Routers that keep their weight narrow and multiply wide, norms that weight by 1 + w, transposed
weights: each becomes a parameter of its own, made by its recipe while the checkpoint is streamed.

Level: captured -> captured. Numerics: exact.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from xllm.graph import Weight, add_placeholder, calls_of
from xllm.passes.core import ModelFacts, PassContext
from xllm.passes.rewrite import full_args
from xllm.weights import Add, Cast, Leaf, Recipe, Transpose

aten = torch.ops.aten


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cast(part: Recipe, dtype: torch.dtype, *flags: object) -> Recipe:
    return Cast(part, _name(dtype))


def _add(part: Recipe, value: object, alpha: float) -> Recipe | None:
    return Add(part, float(value) * alpha) if isinstance(value, (int, float)) else None


#: aten op → recipe step from (recipe of the first argument, the other arguments).
_STEPS: dict[object, Callable[..., Recipe | None]] = {
    aten.to.dtype: _cast,
    aten.add.Tensor: _add,
    aten.transpose.int: Transpose,
}


def _recipe(node: fx.Node) -> Recipe | None:
    """The recipe of a node that depends on one parameter only; None for any other."""
    source, *rest = full_args(node)
    if not isinstance(source, fx.Node) or not isinstance(source.meta.get("bind"), Weight):
        return None
    recipe = source.meta["bind"].recipe
    if isinstance(recipe, Leaf):  # a file may hold more digits than the model has
        recipe = Cast(recipe, _name(source.meta["val"].dtype))
    return _STEPS[node.target](recipe, *rest)


def fold_parameters(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Compute once, while loading, what depends on parameters only."""
    sites = 0
    for node in calls_of(gm, *_STEPS):
        recipe = _recipe(node)
        if recipe is None:
            continue
        with node.meta["val"].fake_mode:
            val = torch.empty(node.meta["val"].shape, dtype=node.meta["val"].dtype, device="meta")
        node.replace_all_uses_with(add_placeholder(gm, node.name, Weight(recipe), val))
        gm.graph.erase_node(node)
        sites += 1
    return sites


def expected(model: ModelFacts, ctx: PassContext) -> int | None:
    return None
