"""recognise_moe_route on whole routers; each rule by itself is in ``rule_table.py``."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.zoo import UNNAMED, ZOO
from xllm.compiler.capture import capture
from xllm.compiler.pipeline import PIPELINE
from xllm.compiler.runner import clean, run_pass
from xllm.graph import Program, calls_of, copy_program
from xllm.passes.core import Pass, PassContext
from xllm.passes.recognise_moe_route import expected, recognise_moe_route
from xllm.targets import find

aten, xllm = torch.ops.aten, torch.ops.xllm
BF16 = torch.bfloat16
#: Family → what its router is, without logits and bias.
ROUTERS = {
    "qwen3_moe": (2, "softmax", [1, 1], True, 0.0, 1.0, BF16),
    "deepseek_v3": (2, "sigmoid", [4, 2], True, 1e-20, 2.5),
    "gpt_oss": (2, "softmax_after_top_k"),
}
OTHERS = {
    "qwen2_moe": (2, "softmax", [1, 1], False, 0.0, 1.0, BF16),
    "deepseek_v2": (2, "softmax", [4, 2]),
    "deepseek_v2-lite": (2, "softmax"),
    "mixtral": (2, "softmax", [1, 1], True),
    "glm4_moe": (2, "sigmoid", [4, 2], True, 1e-20),
    "mimo_v2": (2, "sigmoid", [1, 1], True, 1e-20),
    "minimax_m2": (8, "sigmoid", [1, 1], True),
}


@functools.cache
def _before(family: str) -> tuple[Program, PassContext]:
    """The captured program and the passes up to the one tested here."""
    program, facts = capture((ZOO | UNNAMED)[family](), BF16)
    ctx = PassContext(facts, find("cpu"), BF16, 4, program.inputs)
    clean(program)
    for item in PIPELINE:
        if item.name == "recognise_moe_route":
            break
        item.apply(program, ctx)
        clean(program)
    return program, ctx


def before(family: str) -> tuple[Program, PassContext, Pass]:
    """A copy to edit, the context, and the pass."""
    program, ctx = _before(family)
    return copy_program(program), ctx, next(p for p in PIPELINE if p.name == "recognise_moe_route")


def check(family: str, router: tuple) -> None:
    """As many routers as layers with experts, with these arguments, and no aten top-k left."""
    program, ctx, item = before(family)
    record, _ = run_pass(item, program, ctx, "captured")
    assert record.sites == record.expected == ctx.facts.num_moe_layers > 0
    (gm,) = program.pieces.values()
    routes = list(calls_of(gm, xllm.moe_route.default))
    assert len(routes) == record.sites
    for node in routes:
        bias, *rest = node.args[1:]
        assert tuple(rest) == router
        assert (bias is not None) == (router[1] == "sigmoid")
    assert not list(calls_of(gm, aten.topk.default, aten.div_.Tensor, aten.scatter_.value))


@pytest.mark.parametrize("family", ROUTERS)
def test_hit(family: str) -> None:
    check(family, ROUTERS[family])


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHERS)
def test_hit_in_other_families(family: str) -> None:
    check(family, OTHERS[family])


def test_miss_another_score() -> None:
    """The count tells that a router was not recognised."""
    program, ctx, item = before("qwen3_moe")
    (gm,) = program.pieces.values()
    next(calls_of(gm, aten.softmax.int)).target = aten.log_softmax.int
    with pytest.raises(Exception, match="recognise_moe_route rewrote 1 sites.*expected 2"):
        run_pass(item, program, ctx, "captured")


def test_second_user_of_the_weights() -> None:
    """Somebody else reads the weights that are normalised in place: they stay."""
    program, ctx, _ = before("qwen3_moe")
    (gm,) = program.pieces.values()
    weights = next(calls_of(gm, aten.div_.Tensor)).args[0]
    (output,) = gm.graph.find_nodes(op="output")
    output.args = ((*output.args[0], weights),)
    assert recognise_moe_route(gm, ctx) == 1


def test_expected_is_told_for_known_routers_only() -> None:
    _, ctx, _ = before("ernie4_5_moe")
    assert ctx.facts.num_moe_layers == 1 and expected(ctx.facts, ctx) is None
