"""group_experts and pack_experts: a loop over experts becomes one matrix product per group."""

from __future__ import annotations

import random
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
    program_of,
    targets,
    xllm,
)
from xllm.graph import Call, Program, Weight, calls_of
from xllm.ops import REGISTRY
from xllm.passes import pack_experts as packing
from xllm.passes.group_experts import expected, group_experts
from xllm.passes.pack_experts import pack_experts
from xllm.weights import Concat, Leaf, Pack, Slice, Transpose

BF16 = torch.bfloat16
E, K, H, WIDTH = 4, 2, 8, 6
WEIGHTS = ("gate_up", "down", "gate_up_bias", "down_bias")
GROUPED = [xllm.group_tokens.default, xllm.group_matmul.default, xllm.gated_activation.default,
           xllm.group_matmul.default, xllm.combine_experts.default]


def arguments(dtype: torch.dtype = torch.float32, transposed: bool = False) -> dict[str, Tensor]:
    """Fakes of what an experts node reads."""
    shapes = {"x": (T, H), "weights": (T, K), "gate_up": (E, 2 * WIDTH, H), "down": (E, H, WIDTH),
              "gate_up_bias": (E, 2 * WIDTH), "down_bias": (E, H)}
    if transposed:
        shapes |= {"gate_up": (E, H, 2 * WIDTH), "down": (E, WIDTH, H)}
    fakes = {name: fake(shape, dtype) for name, shape in shapes.items()}
    return fakes | {"ids": fake((T, K), torch.int64)}


def block(x: object, ids: object, weights: object, gate_up: object, down: object,
          gate_up_bias: object, down_bias: object, *options: object) -> object:
    return xllm.experts.default(x, ids, weights, gate_up, down, gate_up_bias, down_bias, "silu",
                                *options)


def graph(function: object = block, **more: object) -> fx.GraphModule:
    """``function``, one block unless told, over these arguments."""
    return build(function, arguments(**more), WEIGHTS)


def interleaved(**given: object) -> object:
    """Gate and up as even and odd features, weights transposed."""
    return block(*(given[n] for n in ("x", "ids", "weights", *WEIGHTS)), None, True, True)


def group(gm: fx.GraphModule) -> tuple[int, Program]:
    """Run the pass on a program of one piece."""
    program = program_of(gm, context())
    return group_experts(program, context()), program


def weights_of(gm: fx.GraphModule, target: object) -> list[Weight]:
    """Bindings of the weights that products read."""
    return [node.args[1].meta["bind"] for node in calls_of(gm, target)]


def without_views(gm: fx.GraphModule) -> list[object]:
    """Targets of xllm."""
    return [t for t in targets(clean(gm)) if getattr(t, "namespace", "") == "xllm"]


def test_hit() -> None:
    gm = graph()
    sites, program = group(gm)
    assert sites == 1 and without_views(gm) == GROUPED
    assert weights_of(gm, xllm.group_matmul.default) == [
        Weight(Leaf("gate_up.weight")), Weight(Leaf("down.weight"))]
    (output,) = gm.graph.find_nodes(op="output")
    shapes = [(n.meta["val"].dtype, tuple(n.meta["val"].shape)) for n in output.args[0]]
    assert shapes == [(torch.float32, (T, H)), (torch.int32, (E,))]
    assert program.schedule == [Call("model", outputs=("logits", "expert_load.0"))]


def test_transposed_and_interleaved_weights_become_one_layout() -> None:
    gm = graph(interleaved, transposed=True)
    assert group(gm)[0] == 1
    turned = Transpose(Leaf("gate_up.weight"), 1, 2)
    halves = Concat((Slice(turned, 1, 0, 2 * WIDTH, 2), Slice(turned, 1, 1, 2 * WIDTH, 2)), 1)
    assert weights_of(gm, xllm.group_matmul.default) == [
        Weight(halves), Weight(Transpose(Leaf("down.weight"), 1, 2))]
    first = next(calls_of(gm, xllm.group_matmul.default))
    bias = Leaf("gate_up_bias.weight")
    assert first.args[2].meta["bind"] == Weight(
        Concat((Slice(bias, 1, 0, 2 * WIDTH, 2), Slice(bias, 1, 1, 2 * WIDTH, 2)), 1))


def test_miss_a_layout_that_no_recipe_can_change() -> None:
    def computed(gate_up: object, **rest: object) -> object:
        return block(gate_up=aten.neg.default(gate_up), **rest)

    assert group(graph(computed))[0] == 1

    def turned(gate_up: object, **rest: object) -> object:
        return interleaved(gate_up=aten.neg.default(gate_up), **rest)

    gm = graph(turned, transposed=True)
    before = targets(gm)
    sites, program = group(gm)
    assert sites == 0 and targets(clean(gm)) == before
    assert program.schedule == [Call("model")]


def test_second_user() -> None:
    """Everybody who read the block's result or its inputs still does."""
    def used(x: object, ids: object, **rest: object) -> tuple[object, ...]:
        out = block(x=x, ids=ids, **rest)
        return out, aten.neg.default(out), aten.neg.default(x), aten.neg.default(ids)

    gm = graph(used)
    assert group(gm)[0] == 1
    (output,) = gm.graph.find_nodes(op="output")
    first, second, *_ = output.args[0]
    assert first.target is xllm.combine_experts.default and second.args == (first,)


def test_loads_are_numbered_over_the_schedule() -> None:
    """A piece that is called twice defines two values; a piece without experts none."""
    def two(**given: object) -> object:
        return block(**given | {"x": block(**given)})

    program = program_of(graph(two), context())
    dense = build(lambda x: aten.neg.default(x), {"x": fake((T, H))})
    program.pieces["dense"] = dense
    program.schedule = [Call("dense", outputs=("a",)), Call("model", outputs=("b",)),
                        Call("model")]
    assert group_experts(program, context()) == 4
    assert [call.outputs for call in program.schedule] == [
        ("a",), ("b", "expert_load.0", "expert_load.1"),
        ("logits", "expert_load.2", "expert_load.3")]


def test_pack_hit_and_miss() -> None:
    gm = graph(dtype=BF16)
    group(gm)
    assert pack_experts(gm, context(BF16)) == 2
    packed = xllm.packed_group_matmul.default
    assert without_views(gm) == [packed if t is xllm.group_matmul.default else t for t in GROUPED]
    assert weights_of(gm, packed)[0] == Weight(Pack(Leaf("gate_up.weight")))
    assert [n.args[5] for n in calls_of(gm, packed)] == [2 * WIDTH, H]
    narrow = graph(dtype=torch.float32)
    group(narrow)
    assert pack_experts(narrow, context()) == 0


@pytest.mark.parametrize(("dtype", "sites"), [(torch.float32, 0), (BF16, 2)])
def test_expected(dtype: torch.dtype, sites: int) -> None:
    assert expected(FACTS, context()) == 1
    assert packing.expected(FACTS, context(dtype)) == sites
    none = replace(FACTS, num_moe_layers=0, num_even_expert_weights=0)
    assert expected(none, context()) == packing.expected(none, context(dtype)) == 0


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), dtype=st.sampled_from([torch.float32, BF16]))
def test_chain_and_values(seed: int, dtype: torch.dtype) -> None:
    """Two blocks in a row, of any layout and gate; tokens per expert are counted."""
    names = ("x", "ids", "weights", *WEIGHTS)
    *tensors, activation, limit, interleaved, transposed = REGISTRY["experts"].sample(
        random.Random(seed), dtype)
    given = {n: t for n, t in zip(names, tensors, strict=True) if t is not None}

    def two(**found: object) -> object:
        rest = [found.get(n) for n in names[1:]]
        options = activation, limit, interleaved, transposed
        first = xllm.experts.default(found["x"], *rest, *options)
        return xllm.experts.default(first, *rest, *options)

    gm = build(two, {n: fake((T, *t.shape[1:]) if n in names[:3] else tuple(t.shape), t.dtype)
                     for n, t in given.items()}, WEIGHTS)
    want = execute_bound(gm, given)
    assert group(gm)[0] == 2
    pack_experts(gm, context(dtype))
    got, *loads = execute_bound(clean(gm), given)
    bound = {torch.float32: 1e-5, BF16: 3e-2}[dtype]
    torch.testing.assert_close(got, want[0], rtol=bound, atol=bound)
    experts = given["down"].shape[0]
    assert all(torch.equal(n.long(), given["ids"].flatten().bincount(minlength=experts))
               for n in loads)
