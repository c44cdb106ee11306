"""Weight recipes: how a graph's parameters are made from checkpoint tensors, as data.

A pass that changes a parameter never touches a tensor; it replaces the parameter's expression. The
loader evaluates one expression at a time from memory-mapped files: while a merged and packed
parameter is made, up to three copies of that one exist, and never two of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from xllm.ops.linear import pack


@dataclass(frozen=True)
class Leaf:
    """A checkpoint tensor by name (before roll-up) or by its name in the layer (after)."""

    name: str


@dataclass(frozen=True)
class Concat:
    """Parts concatenated along the first dimension."""

    parts: tuple[Recipe, ...]


@dataclass(frozen=True)
class Pack:
    """A ``[N, K]`` weight in the layout of :func:`xllm.ops.linear.pack`."""

    part: Recipe


Recipe = Leaf | Concat | Pack


def leaves(recipe: Recipe) -> list[str]:
    """Names of the checkpoint tensors that a recipe reads, in order."""
    match recipe:
        case Leaf(name):
            return [name]
        case Concat(parts):
            return [name for part in parts for name in leaves(part)]
        case Pack(part):
            return leaves(part)


def rename(recipe: Recipe, names: Callable[[str], str]) -> Recipe:
    """The same recipe over other leaves."""
    match recipe:
        case Leaf(name):
            return Leaf(names(name))
        case Concat(parts):
            return Concat(tuple(rename(part, names) for part in parts))
        case Pack(part):
            return Pack(rename(part, names))


def evaluate(recipe: Recipe, load: Callable[[str], Tensor]) -> Tensor:
    """The parameter's tensor, contiguous; ``load`` maps a leaf name to its tensor."""
    match recipe:
        case Leaf(name):
            return load(name).contiguous()
        case Concat(parts):
            return torch.cat([evaluate(part, load) for part in parts])
        case Pack(part):
            return pack(evaluate(part, load))


def to_json(recipe: Recipe) -> dict:
    """JSON form; :func:`from_json` is its inverse."""
    match recipe:
        case Leaf(name):
            return {"leaf": name}
        case Concat(parts):
            return {"concat": [to_json(part) for part in parts]}
        case Pack(part):
            return {"pack": to_json(part)}


def from_json(data: dict) -> Recipe:
    """Inverse of :func:`to_json`; raises ValueError on an unknown step."""
    match data:
        case {"leaf": str(name)}:
            return Leaf(name)
        case {"concat": list(parts)}:
            return Concat(tuple(from_json(part) for part in parts))
        case {"pack": dict(part)}:
            return Pack(from_json(part))
    raise ValueError(f"unknown weight recipe step {data!r}; known: leaf, concat, pack")
