"""Graphs as JSON keep their values; as text they read well; unknown things are named."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from torch import fx

from tests.passes.pass_graphs import (
    T,
    assert_equal,
    aten,
    build,
    execute,
    fake,
    lines,
    xllm,
)
from tests.tiny import CASES, PAGE_SIZE, captured, case_id, stages
from xllm.compiler.verify import Oracle, draw_batch
from xllm.graph import Carried, Constant, Input, Program, State, Weight
from xllm.serialize import (
    bind_from_json,
    bind_to_json,
    find_target,
    graph_from_json,
    graph_to_json,
    target_name,
    type_text,
)
from xllm.weights import Concat, Leaf, Pack


def through_json(gm: fx.GraphModule) -> fx.GraphModule:
    """Stored and read again; the types, which JSON does not hold, are put back."""
    back = graph_from_json(json.loads(json.dumps(graph_to_json(gm))))
    for old, new in zip(gm.graph.nodes, back.graph.nodes, strict=True):
        if "val" in old.meta:
            new.meta["val"] = old.meta["val"]
    return back


@pytest.mark.parametrize(("family", "dtype"), CASES, ids=case_id)
def test_round_trip_keeps_values_and_text(family: str, dtype: torch.dtype) -> None:
    found, _, ctx = stages(family, dtype)
    program = found[-1].after
    back = Program({name: through_json(gm) for name, gm in program.pieces.items()},
                   program.schedule, program.inputs, program.constants, program.fake_mode)
    oracle = Oracle(captured(family, dtype)[0])
    batch = draw_batch(random.Random(3), PAGE_SIZE, single=False)
    runs = [oracle.run(p, batch, ctx.facts.vocab_size) for p in (program, back)]
    assert_equal([runs[1]], [runs[0]])
    for name, gm in program.pieces.items():
        assert lines(back.pieces[name]) == lines(gm)


def test_placeholders_keep_type_and_shape() -> None:
    gm = build(lambda x: aten.neg.default(x), {"x": fake((1, T, 8), torch.bfloat16)})
    back = graph_from_json(graph_to_json(gm))
    (node,) = back.graph.find_nodes(op="placeholder")
    assert node.meta["dtype"] == torch.bfloat16
    assert node.meta["shape"] == (1, str(T), 8)


def test_special_arguments() -> None:
    def special(x: torch.Tensor) -> torch.Tensor:
        x = aten.clamp.default(x, -math.inf, math.inf)
        x = aten.to.dtype_layout(x, dtype=torch.float64, layout=torch.strided,
                                 device=torch.device("cpu"))
        x = aten.clone.default(x, memory_format=torch.contiguous_format)
        return aten.add.Tensor(aten.mul.Tensor(x, True), 0.1 + 0.2)

    gm = build(special, {"x": fake((3,))})
    value = {"x": torch.randn(3)}
    back = through_json(gm)
    assert lines(back) == lines(gm)
    assert_equal(execute(back, value), execute(gm, value))
    mul = next(n for n in back.graph.nodes if n.target is aten.mul.Tensor)
    assert mul.args[1] is True


@pytest.mark.parametrize("bind", [
    Input("ids"), Constant("inv_freq"), State("kv_cache"), Carried(),
    Weight(Pack(Concat((Leaf("a"), Leaf("b"))))),
])
def test_bindings_round_trip(bind: object) -> None:
    assert bind_from_json(json.loads(json.dumps(bind_to_json(bind)))) == bind


def test_unknown_things_are_named() -> None:
    for name in ("aten.no_such_op.default", "aten.neg.no_such", "nonsense", "os.system.x"):
        with pytest.raises(ValueError, match=f"unknown op '{name}'"):
            find_target(name)
    with pytest.raises(ValueError, match="unknown binding"):
        bind_from_json({"somewhere": "x"})
    with pytest.raises(ValueError, match="cannot be stored"):
        target_name(print)
    gm = build(lambda x: aten.neg.default(x), {"x": fake((3,))})
    next(n for n in gm.graph.nodes if n.op == "call_function").args = (object(),)
    with pytest.raises(ValueError, match="cannot be stored"):
        graph_to_json(gm)


def test_targets_round_trip() -> None:
    for target in (aten.mul.Tensor, xllm.rope.default, aten.sym_size.int):
        assert find_target(target_name(target)) is target


def test_text() -> None:
    gm = build(lambda x: aten.slice.Tensor(aten.view.default(x, [1, -1, 2, 4]), 1, 1, 2**63 - 1),
               {"x": fake((1, T, 8), torch.bfloat16)})
    assert lines(gm).splitlines() == [
        "%x : bf16[1, T, 8] <- Constant(name='x')",
        "%view_default : bf16[1, T, 2, 4] = aten.view(%x, [1, -1, 2, 4])",
        lines(gm).splitlines()[2], "return [%slice_tensor]"]
    assert lines(gm).splitlines()[2].endswith("= aten.slice.Tensor(%view_default, 1, 1, end)")
    assert type_text((fake((2,)), None)) == "(f32[2], NoneType)"
