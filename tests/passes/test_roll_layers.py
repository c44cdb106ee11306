"""roll_layers: equal layers become one piece; the schedule calls it once per layer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.passes.pass_graphs import (
    FACTS,
    MODE,
    T,
    assert_equal,
    aten,
    build,
    context,
    fake,
    lines,
    xllm,
)
from xllm.backends.eager import interpret
from xllm.graph import Call, Carried, Program, Weight, placeholders
from xllm.passes.roll_layers import RollError, assign_pieces, roll_layers
from xllm.weights import Leaf, evaluate

LAYERS = 3


def model(layers: int = LAYERS, scales: tuple[float, ...] = (1.0,) * 9) -> Program:
    """``x = x + linear(norm(x)) * scale`` per layer behind an embedding, then norm and head."""
    arguments: dict[str, object] = {"ids": fake((1, T), torch.int64), "embed": fake((20, 8))}
    for i in range(layers):
        arguments |= {f"norm{i}": fake((8,)), f"proj{i}": fake((8, 8))}
    arguments |= {"norm": fake((8,)), "head": fake((20, 8))}
    paths: list[str] = []

    def run(ids: Tensor, embed: Tensor, norm: Tensor, head: Tensor, **layer: Tensor) -> Tensor:
        x = aten.embedding.default(embed, ids)
        paths.append("")
        for i in range(layers):
            y = xllm.rms_norm.default(x, layer[f"norm{i}"], 1e-5)
            y = aten.mul.Tensor(aten.linear.default(y, layer[f"proj{i}"]), scales[i])
            x = aten.add.Tensor(x, y)
            paths.extend([f"model.layers.{i}"] * 4)
        paths.extend(["model.norm", "lm_head"])
        return aten.linear.default(xllm.rms_norm.default(x, norm, 1e-5), head)

    gm = build(run, arguments, tuple(n for n in arguments if n != "ids"))
    calls = [n for n in gm.graph.nodes if n.op == "call_function"]
    for node, path in zip(calls, paths, strict=True):
        node.meta["nn_module_stack"] = {"m": (path, "Test")} if path else {}
    for node in placeholders(gm, Weight):
        kind, index = node.name.rstrip("0123456789"), node.name.lstrip("abcdefghijklmnopqrstuvwxyz")
        name = f"model.layers.{index}.{kind}.weight" if index else f"model.{kind}.weight"
        node.meta["bind"] = Weight(Leaf(name))
    return Program({"model": gm}, [Call("model")], context().inputs, {}, MODE)


def roll(program: Program, layers: int = LAYERS) -> int:
    """Run the pass."""
    return roll_layers(program, context(facts=replace(FACTS, num_layers=layers)))


def run_program(program: Program, ids: Tensor, seed: int) -> Tensor:
    """Interpret the schedule with weights that depend on their names."""
    def load(name: str) -> Tensor:
        generator = torch.Generator().manual_seed(seed + sum(map(ord, name)) * 7919)
        shape = (20, 8) if "embed" in name or "head" in name else (8, 8) if "proj" in name else (8,)
        return torch.randn(shape, generator=generator)

    values = {"ids": ids}
    for call in program.schedule:
        gm = program.pieces[call.piece]
        inputs = []
        for node in placeholders(gm):
            match node.meta["bind"]:
                case Weight(recipe):
                    inputs.append(evaluate(recipe, lambda leaf: load(call.leaves.get(leaf, leaf))))
                case Carried():
                    inputs.append(values[call.carried[node.name]])
                case _:
                    inputs.append(ids)
        values.update(zip(call.outputs, interpret(gm)(inputs), strict=True))
    return values["logits"]


def test_hit() -> None:
    program = model()
    assert roll(program) == LAYERS
    assert [call.piece for call in program.schedule] == ["prologue"] + ["layer"] * 3 + ["epilogue"]
    assert [call.leaves.get("proj.weight") for call in program.schedule[1:4]] == [
        f"model.layers.{i}.proj.weight" for i in range(3)]
    assert [call.leaves.get("next.norm.weight") or call.leaves.get("next.model.norm.weight")
            for call in program.schedule[1:4]] == [
        "model.layers.1.norm.weight", "model.layers.2.norm.weight", "model.norm.weight"]


def test_residual_add_and_next_norm_share_a_piece() -> None:
    program = model()
    roll(program)
    text = lines(program.pieces["layer"])
    assert text.index("aten.add") < text.index("xllm.rms_norm")
    assert "xllm.rms_norm" in lines(program.pieces["prologue"])
    assert "xllm.rms_norm" not in lines(program.pieces["epilogue"])


def test_miss_a_layer_with_another_constant_is_another_kind() -> None:
    program = model(scales=(1.0, 2.0, 1.0))
    assert roll(program) == LAYERS
    assert [call.piece for call in program.schedule[1:4]] == ["layer_0", "layer_1", "layer_0"]


def test_second_user_outside_the_layer_becomes_an_output() -> None:
    """A value of layer 0 that the end reads again leaves every instance of the piece."""
    program = model()
    (gm,) = program.pieces.values()
    (out,) = gm.graph.find_nodes(op="output")
    head = out.args[0][0]
    first = next(n for n in gm.graph.nodes if n.target is aten.linear.default)
    with gm.graph.inserting_before(head):
        both = gm.graph.call_function(aten.add.Tensor, (head.args[0], first))
    both.meta = {"val": fake((1, T, 8)), "nn_module_stack": {}}
    head.args = (both, head.args[1])
    want = run_program(program, torch.tensor([[3, 1]]), 0)
    assert roll(program) == LAYERS
    assert len({len(c.outputs) for c in program.schedule if c.piece == "layer"}) == 1
    assert_equal([run_program(program, torch.tensor([[3, 1]]), 0)], [want])


def test_a_size_that_crosses_a_boundary_is_an_error() -> None:
    program = model(1)
    (gm,) = program.pieces.values()
    embedding, linear = (next(n for n in gm.graph.nodes if n.target is t)
                         for t in (aten.embedding.default, aten.linear.default))
    with gm.graph.inserting_before(embedding):
        size = gm.graph.call_function(aten.sym_size.int, (embedding.args[1], 1))
    size.meta = {"val": T}
    with gm.graph.inserting_after(linear):
        view = gm.graph.call_function(aten.view.default, (linear, [1, size, 8]))
    view.meta = dict(linear.meta)
    linear.replace_all_uses_with(view, delete_user_cb=lambda user: user is not view)
    with pytest.raises(RollError, match=size.name):
        roll(program, 1)


def test_assignment_alone() -> None:
    (gm,) = model(2).pieces.values()
    pieces = [piece for _, piece in sorted(assign_pieces(gm.graph, 2).items())]
    assert pieces == [-1, -1, 0, 0, 0, 0, 1, 1, 1, 1, 2]


@settings(max_examples=10, deadline=None)
@given(layers=st.integers(1, 4), tokens=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_chain_and_values(layers: int, tokens: int, seed: int) -> None:
    ids = torch.randint(20, (1, tokens), generator=torch.Generator().manual_seed(seed))
    scales = tuple(float(1 + (seed >> i) % 2) for i in range(9))
    program = model(layers, scales)
    want = run_program(program, ids, seed)
    assert roll(program, layers) == layers
    assert_equal([run_program(program, ids, seed)], [want])

