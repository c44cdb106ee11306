"""Weight recipes: evaluate, rename, leaves, JSON."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm import weights
from xllm.ops.linear import pack
from xllm.weights import Concat, Leaf, Pack, Recipe, Reshape, Slice, Stack, Transpose

TENSORS = {name: torch.arange(8.0 * rows).view(rows, 8) + 100 * i
           for i, (name, rows) in enumerate({"a": 2, "b": 3, "c": 33}.items())}

LEAVES = st.sampled_from(sorted(TENSORS)).map(Leaf)
PLAIN = st.recursive(LEAVES, lambda inner: st.lists(inner, min_size=1, max_size=3).map(
    lambda parts: Concat(tuple(parts))), max_leaves=5)
RECIPES = PLAIN | PLAIN.map(Pack) | PLAIN.map(lambda part: Slice(part, 1, 1, 7, 2)) | PLAIN.map(
    lambda part: Reshape(Transpose(part, 0, 1), (2, -1)))


def test_leaf_is_contiguous() -> None:
    turned = TENSORS["c"].t()
    value = weights.evaluate(Leaf("x"), {"x": turned}.__getitem__)
    assert value.is_contiguous() and torch.equal(value, turned)


def test_concat_and_pack() -> None:
    recipe = Pack(Concat((Leaf("a"), Leaf("b"))))
    want = pack(torch.cat([TENSORS["a"], TENSORS["b"]]))
    assert torch.equal(weights.evaluate(recipe, TENSORS.__getitem__), want)


def test_layout_steps_mean_what_torch_means() -> None:
    a, load = TENSORS["a"], TENSORS.__getitem__
    for recipe, want in [
        (Concat((Leaf("a"), Leaf("a")), 1), torch.cat([a, a], 1)),
        (Stack((Leaf("a"), Leaf("a"))), torch.stack([a, a])),
        (Stack((Leaf("a"), Leaf("a")), 1), torch.stack([a, a], 1)),
        (Slice(Leaf("a"), 1, 1, 8, 2), a[:, 1:8:2]),
        (Transpose(Leaf("a"), 0, 1), a.t()),
        (Reshape(Leaf("a"), (4, 4)), a.reshape(4, 4)),
    ]:
        made = weights.evaluate(recipe, load)
        assert torch.equal(made, want) and made.is_contiguous()


def test_substitute_puts_recipes_in_place_of_leaves() -> None:
    made_of = {"x": Stack((Leaf("a"), Leaf("a"))), "y": Stack((Leaf("b"), Leaf("b")))}
    recipe = Slice(Concat((Leaf("x"), Leaf("y")), 1), 1, 1, 4)
    got = weights.substitute(recipe, made_of.__getitem__)
    assert weights.leaves(got) == ["a", "a", "b", "b"]
    parts = [weights.evaluate(made_of[n], TENSORS.__getitem__) for n in "xy"]
    assert torch.equal(weights.evaluate(got, TENSORS.__getitem__), torch.cat(parts, 1)[:, 1:4])


@settings(max_examples=40, deadline=None)
@given(recipe=RECIPES)
def test_json_round_trip(recipe: Recipe) -> None:
    assert weights.from_json(json.loads(json.dumps(weights.to_json(recipe)))) == recipe


@settings(max_examples=40, deadline=None)
@given(recipe=RECIPES)
def test_rename_changes_leaves_only(recipe: Recipe) -> None:
    renamed = weights.rename(recipe, lambda name: "layer." + name)
    assert weights.leaves(renamed) == ["layer." + name for name in weights.leaves(recipe)]
    assert weights.rename(renamed, lambda name: name.removeprefix("layer.")) == recipe
    want = weights.evaluate(recipe, TENSORS.__getitem__)
    got = weights.evaluate(renamed, lambda name: TENSORS[name.removeprefix("layer.")])
    assert torch.equal(got, want)


def test_rename_maps_every_leaf_or_fails() -> None:
    with pytest.raises(KeyError, match="b"):
        weights.rename(Concat((Leaf("a"), Leaf("b"))), {"a": "x"}.__getitem__)


@pytest.mark.parametrize("data", [{"quantise": {"leaf": "a"}}, {}, {"leaf": 3}, {"pack": ["a"]},
                                  {"concat": [{"leaf": "a"}, {"lief": "b"}]}])
def test_unknown_steps_name_the_known_ones(data: dict) -> None:
    with pytest.raises(ValueError, match="unknown weight recipe step .*; known: leaf, concat"):
        weights.from_json(data)
