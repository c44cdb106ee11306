"""The matcher and its guards, on rules made for the purpose."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import Tensor, fx

from tests.passes.pass_graphs import MODE, T, aten, build, clean, fake, lines, targets, xllm
from xllm.graph import retype
from xllm.passes.rewrite import Rewrite, apply

X, Y = fake((1, T, 8)), fake((1, T, 8))


def exp_of_neg(x: Tensor) -> Tensor:
    return aten.exp.default(aten.neg.default(x))


def reciprocal_of_exp(x: Tensor) -> Tensor:
    return aten.reciprocal.default(aten.exp.default(x))


RULE = Rewrite(exp_of_neg, reciprocal_of_exp)
REPLACED = [aten.exp.default, aten.reciprocal.default]


def sites(rule: Rewrite, function: Callable[..., object], **arguments: object) -> int:
    """Sites of the rule in the graph of ``function``; without one the graph is unchanged."""
    gm = build(function, arguments)
    before = lines(gm)
    count = apply((rule,), gm)
    assert count or lines(gm) == before
    clean(gm)
    return count


def node(gm: fx.GraphModule, target: object) -> fx.Node:
    """The only call of ``target``."""
    (found,) = gm.graph.find_nodes(op="call_function", target=target)
    return found


def test_hit() -> None:
    gm = build(exp_of_neg, {"x": X})
    assert apply((RULE,), gm) == 1
    assert targets(clean(gm)) == REPLACED
    assert lines(gm).splitlines()[-1] == "return [%reciprocal_default]"


def test_miss_another_op() -> None:
    assert sites(RULE, lambda x: aten.exp.default(aten.abs.default(x)), x=X) == 0


def test_miss_a_placeholder_is_no_op() -> None:
    assert sites(RULE, lambda x: aten.exp.default(x), x=X) == 0


def test_miss_another_literal() -> None:
    rule = Rewrite(lambda x: aten.pow.Tensor_Scalar(x, 2), lambda x: aten.mul.Tensor(x, x))
    assert sites(rule, lambda x: aten.pow.Tensor_Scalar(x, 2), x=X) == 1
    assert sites(rule, lambda x: aten.pow.Tensor_Scalar(x, 3), x=X) == 0
    assert sites(rule, lambda x: aten.pow.Tensor_Scalar(x, 2.0), x=X) == 0


def test_miss_another_order_of_arguments() -> None:
    rule = Rewrite(lambda x, y: aten.sub.Tensor(aten.neg.default(x), y),
                   lambda x, y: aten.neg.default(aten.add.Tensor(x, y)))
    assert sites(rule, lambda x, y: aten.sub.Tensor(aten.neg.default(x), y), x=X, y=Y) == 1
    assert sites(rule, lambda x, y: aten.sub.Tensor(y, aten.neg.default(x)), x=X, y=Y) == 0


def test_defaults_and_keywords_are_the_same_argument() -> None:
    rule = Rewrite(lambda x, y: aten.add.Tensor(x, y), lambda x, y: aten.add.Tensor(y, x))
    assert sites(rule, lambda x, y: aten.add.Tensor(x, y, alpha=1), x=X, y=Y) == 1
    assert sites(rule, lambda x, y: aten.add.Tensor(x, y, alpha=2), x=X, y=Y) == 0


def test_a_repeated_parameter_binds_one_value() -> None:
    rule = Rewrite(lambda x: aten.mul.Tensor(x, x), lambda x: aten.pow.Tensor_Scalar(x, 2))
    assert sites(rule, lambda x, y: aten.mul.Tensor(x, y), x=X, y=X) == 0
    assert sites(rule, lambda x: aten.mul.Tensor(x, x), x=X) == 1


def test_a_repeated_literal_binds_one_value() -> None:
    rule = Rewrite(lambda x, n: aten.add.Tensor(aten.mul.Tensor(x, n), n),
                   lambda x, n: aten.mul.Tensor(aten.add.Tensor(x, 1), n))
    for first, second, expected in ((2, 2, 1), (2, 3, 0), (2, 2.0, 0)):
        assert sites(rule, lambda x, a, b: aten.add.Tensor(aten.mul.Tensor(x, a), b),
                     x=X, a=first, b=second) == expected


def test_a_parameter_binds_a_list() -> None:
    rule = Rewrite(lambda x, shape: aten.view.default(aten.neg.default(x), shape),
                   lambda x, shape: aten.neg.default(aten.view.default(x, shape)))
    gm = build(lambda x: aten.view.default(aten.neg.default(x), [1, -1, 2, 4]), {"x": X})
    assert apply((rule,), gm) == 1
    assert node(clean(gm), aten.view.default).args[1] == [1, -1, 2, 4]


def test_a_parameter_binds_a_list_with_sizes_from_the_graph() -> None:
    rule = Rewrite(lambda x, shape: aten.view.default(aten.neg.default(x), shape),
                   lambda x, shape: aten.neg.default(aten.view.default(x, shape)))

    def sized(x: Tensor) -> Tensor:
        return aten.view.default(aten.neg.default(x), [aten.sym_size.int(x, 1), 8])

    gm = build(sized, {"x": X})
    assert apply((rule,), gm) == 1
    assert targets(clean(gm)) == [aten.sym_size.int, aten.view.default, aten.neg.default]


def test_a_size_that_comes_too_late_for_the_insertion_point() -> None:
    rule = Rewrite(lambda x, s: (aten.neg.default(x), aten.view.default(x, s)),
                   lambda x, s: (aten.neg.default(x), aten.view.default(x, s)))

    def late(x: Tensor) -> tuple[Tensor, ...]:
        negative = aten.neg.default(x)
        used = aten.exp.default(negative)
        return used, aten.view.default(x, [aten.sym_size.int(x, 1), 8]), negative

    assert sites(rule, late, x=X) == 0


def test_second_user_of_an_inner_node() -> None:
    def used_twice(x: Tensor) -> tuple[Tensor, Tensor]:
        inner = aten.neg.default(x)
        return aten.exp.default(inner), aten.abs.default(inner)

    assert sites(RULE, used_twice, x=X) == 0


def test_second_user_of_an_output() -> None:
    def used_twice(x: Tensor) -> tuple[Tensor, Tensor]:
        out = exp_of_neg(x)
        return out, aten.abs.default(out)

    assert sites(RULE, used_twice, x=X) == 1


def both(x: Tensor) -> tuple[Tensor, Tensor]:
    inner = aten.neg.default(x)
    return aten.exp.default(inner), inner


def test_several_outputs() -> None:
    rule = Rewrite(both, lambda x: (aten.reciprocal.default(aten.exp.default(x)),
                                    aten.mul.Tensor(x, -1)))

    def around(x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = both(x)
        return aten.abs.default(first), aten.abs.default(second)

    gm = build(around, {"x": X})
    assert apply((rule,), gm) == 1
    exp, reciprocal, minus = list(clean(gm).graph.nodes)[1:4]
    assert [n.args[0] for n in gm.graph.find_nodes(op="call_function", target=aten.abs.default)] \
        == [reciprocal, minus] and reciprocal.args[0] is exp


def test_outputs_in_separate_trees() -> None:
    rule = Rewrite(lambda x, y: (aten.neg.default(x), aten.mul.Tensor(x, y)),
                   lambda x, y: (aten.mul.Tensor(x, -1), aten.mul.Tensor(y, x)))

    def apart(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return aten.mul.Tensor(y, x), aten.neg.default(x), aten.mul.Tensor(x, y)

    assert sites(rule, apart, x=X, y=Y) == 1
    assert sites(rule, lambda x, y: (aten.neg.default(x), aten.mul.Tensor(y, x)), x=X, y=Y) == 0


def test_chain() -> None:
    gm = build(lambda x: exp_of_neg(exp_of_neg(x)), {"x": X})
    assert apply((RULE,), gm) == 2
    assert targets(clean(gm)) == REPLACED * 2


def test_overlapping_matches_take_each_node_once() -> None:
    rule = Rewrite(lambda x: aten.neg.default(aten.neg.default(x)), lambda x: aten.alias.default(x))
    gm = build(lambda x: aten.neg.default(aten.neg.default(aten.neg.default(x))), {"x": X})
    assert apply((rule,), gm) == 1
    assert targets(clean(gm)) == [aten.alias.default, aten.neg.default]


def test_first_rule_that_matches_wins() -> None:
    other = Rewrite(exp_of_neg, lambda x: aten.exp.default(aten.mul.Tensor(x, -1)))
    for first, second, expected in ((RULE, other, aten.reciprocal.default),
                                    (other, RULE, aten.exp.default)):
        gm = build(exp_of_neg, {"x": X})
        assert apply((first, second), gm) == 1
        assert targets(clean(gm))[-1] is expected


def test_when_sees_the_binding() -> None:
    seen = []
    rule = Rewrite(exp_of_neg, reciprocal_of_exp, lambda m: bool(seen.append(m.val("x").shape[2])))
    assert sites(rule, exp_of_neg, x=X) == 0
    assert seen == [8]


# --- type guard ----------------------------------------------------------------------------------

def test_replacement_of_another_type_is_not_made() -> None:
    for wrong in (lambda x: aten.to.dtype(exp_of_neg(x), torch.bfloat16),
                  lambda x: aten.unsqueeze.default(exp_of_neg(x), 0),
                  lambda x: aten.slice.Tensor(exp_of_neg(x), 1, 0, 1)):
        assert sites(Rewrite(exp_of_neg, wrong), exp_of_neg, x=X) == 0


def test_each_of_several_outputs_is_typed() -> None:
    wrong = Rewrite(both, lambda x: (exp_of_neg(x), aten.to.dtype(x, torch.bfloat16)))
    assert sites(wrong, both, x=X) == 0


# --- insertion point and metadata ----------------------------------------------------------------

def test_inputs_defined_late() -> None:
    """``y`` is computed between the matched nodes: the replacement goes behind it."""
    rule = Rewrite(lambda x, y: aten.mul.Tensor(aten.neg.default(x), y),
                   lambda x, y: aten.neg.default(aten.mul.Tensor(x, y)))

    def late(x: Tensor, y: Tensor) -> Tensor:
        negative = aten.neg.default(x)
        return aten.mul.Tensor(negative, aten.exp.default(y))

    gm = build(late, {"x": X, "y": Y})
    assert apply((rule,), gm) == 1
    assert targets(clean(gm)) == [aten.exp.default, aten.mul.Tensor, aten.neg.default]


def test_no_place_behind_all_inputs_and_before_all_users() -> None:
    """One output is used before an input of the other exists."""
    rule = Rewrite(lambda x, y: (aten.neg.default(x), aten.mul.Tensor(x, y)),
                   lambda x, y: (aten.mul.Tensor(x, -1), aten.mul.Tensor(y, x)))

    def crossed(x: Tensor) -> Tensor:
        negative = aten.neg.default(x)
        return aten.mul.Tensor(x, aten.exp.default(negative))

    assert sites(rule, crossed, x=X) == 0


def test_new_nodes_have_type_and_module_path() -> None:
    gm = build(exp_of_neg, {"x": X})
    stack = {"m": ("model.layers.1.mlp", "MLP")}
    node(gm, aten.exp.default).meta["nn_module_stack"] = stack
    apply((RULE,), gm)
    for new in gm.graph.find_nodes(op="call_function", target=aten.reciprocal.default):
        assert new.meta["nn_module_stack"] == stack
        assert new.meta["val"].shape == X.shape and new.meta["val"].fake_mode is MODE


# --- results ------------------------------------------------------------------------------------

def test_result_tuples_go_through_getitem() -> None:
    rule = Rewrite(lambda x, r, w: xllm.rms_norm.default(aten.add.Tensor(r, x), w, 1e-6),
                   lambda x, r, w: operator.getitem(
                       xllm.add_rms_norm.default(x, r, w, 1e-6), 0))
    assert sites(rule, lambda x, r, w: xllm.rms_norm.default(aten.add.Tensor(r, x), w, 1e-6),
                 x=X, r=Y, w=fake((8,))) == 1


def test_retype_covers_every_new_node() -> None:
    """A replacement of several nodes is typed node by node."""
    gm = build(exp_of_neg, {"x": X})
    rule = Rewrite(exp_of_neg, lambda x: aten.squeeze.dim(reciprocal_of_exp(
        aten.unsqueeze.default(x, 0)), 0))
    assert apply((rule,), gm) == 1
    for new in [n for n in clean(gm).graph.nodes if n.op == "call_function"]:
        kept = new.meta["val"]
        retype(new, MODE)
        assert kept.shape == new.meta["val"].shape
