"""Stand-ins for checkpoint tensors: aten ops on them give weight recipes, never data.

``transformers`` converts checkpoint tensors with ordinary tensor code. Run on stand-ins, that code
writes the recipe of what it would have computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from xllm.checkpoint import CheckpointError
from xllm.weights import Concat, Recipe, Reshape, Slice, Stack, Transpose

aten = torch.ops.aten


class UnknownConversion(CheckpointError):
    """A conversion of ``transformers`` that no weight recipe describes."""


class StandIn(Tensor):
    """A tensor without data that knows its recipe; an aten op on it gives stand-ins again."""

    recipe: Recipe
    empty: Tensor

    @staticmethod
    def __new__(cls, empty: Tensor, recipe: Recipe) -> StandIn:
        made = Tensor._make_wrapper_subclass(
            cls, empty.shape, strides=empty.stride(), dtype=empty.dtype, device="meta")
        made.empty, made.recipe = empty, recipe
        return made

    @classmethod
    def __torch_dispatch__(cls, func: torch._ops.OpOverload, types: object, args: tuple = (),
                           kwargs: dict | None = None) -> object:
        if func not in STEPS:
            raise UnknownConversion(f"no weight recipe step for {func}")
        made = func(*(_emptied(a) for a in args), **(kwargs or {}))
        recipes = STEPS[func](made, *args, **(kwargs or {}))
        if isinstance(made, Tensor):
            return StandIn(made, recipes)
        return [StandIn(m, r) for m, r in zip(made, recipes, strict=True)]


def _emptied(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return [_emptied(v) for v in value]
    return value.empty if isinstance(value, StandIn) else value


def _cat(made: Tensor, parts: Sequence[StandIn], dim: int = 0) -> Recipe:
    return Concat(tuple(p.recipe for p in parts), dim % made.dim())


def _stack(made: Tensor, parts: Sequence[StandIn], dim: int = 0) -> Recipe:
    return Stack(tuple(p.recipe for p in parts), dim % made.dim())


def _split(made: Sequence[Tensor], x: StandIn, sizes: object, dim: int = 0) -> list[Recipe]:
    dim %= x.dim()
    ends = [sum(m.shape[dim] for m in made[:i + 1]) for i in range(len(made))]
    return [Slice(x.recipe, dim, end - m.shape[dim], end)
            for end, m in zip(ends, made, strict=True)]


def _unbind(made: Sequence[Tensor], x: StandIn, dim: int = 0) -> list[Recipe]:
    return [_select(m, x, dim, i) for i, m in enumerate(made)]


def _select(made: Tensor, x: StandIn, dim: int, index: int) -> Recipe:
    dim, index = dim % x.dim(), index % x.shape[dim]
    return Reshape(Slice(x.recipe, dim, index, index + 1), tuple(made.shape))


def _transpose(made: Tensor, x: StandIn, first: int = 0, second: int = 1) -> Recipe:
    return Transpose(x.recipe, first % x.dim(), second % x.dim())


def _reshape(made: Tensor, x: StandIn, *shape: object) -> Recipe:
    return Reshape(x.recipe, tuple(made.shape))


def _same(made: Tensor, x: StandIn, **layout: object) -> Recipe:
    return x.recipe


#: The recipe step of each aten op that ``transformers``' conversions come down to.
STEPS: dict[torch._ops.OpOverload, Callable[..., Recipe | list[Recipe]]] = {
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.unbind.int: _unbind,
    aten.select.int: _select,
    aten.transpose.int: _transpose,
    aten.t.default: _transpose,
    aten.view.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.squeeze.dim: _reshape,
    aten.unsqueeze.default: _reshape,
    aten.clone.default: _same,
    aten.detach.default: _same,
}
