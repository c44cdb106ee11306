"""The generic tests of a rule, as functions that raise when the rule is wrong.

They take the rule from the entry, so that ``test_mutants`` can hand in broken ones.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from torch import Tensor, fx

from tests.passes.pass_graphs import (
    MODE,
    FakeMaker,
    RealMaker,
    assert_equal,
    aten,
    build,
    clean,
    clones,
    execute,
    fake,
    lines,
    targets,
)
from tests.passes.rule_table import Entry
from tests.references import References
from xllm.graph import copy_graph, retype
from xllm.passes.rewrite import Match, Rewrite, apply, full_args

SIZES = 0  # seed of the sizes of the graphs made here


def fakes(entry: Entry, dtype: torch.dtype) -> dict[str, object]:
    """Arguments as fake tensors."""
    return entry.draw(FakeMaker(dtype), random.Random(SIZES))


def reals(entry: Entry, dtype: torch.dtype, seed: int = 1) -> dict[str, object]:
    """Arguments of the same sizes with values."""
    return entry.draw(RealMaker(dtype, random.Random(seed)), random.Random(SIZES))


def graph(entry: Entry, dtype: torch.dtype) -> fx.GraphModule:
    """One site of the rule; every node says where in the model it came from."""
    gm = build(entry.rule.before, fakes(entry, dtype))
    for node in gm.graph.nodes:
        node.meta["nn_module_stack"] = {"m": ("model.layers.0.test", "Test")}
    return gm


def call_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """Call nodes in order; not those that read a size."""
    return [n for n in gm.graph.nodes
            if n.op == "call_function" and n.target is not aten.sym_size.int]


def results(value: object) -> list[object]:
    """The values of a function that returns one or several."""
    return list(value) if isinstance(value, (tuple, list)) else [value]


def output_node(gm: fx.GraphModule) -> fx.Node:
    """The graph's output node."""
    (node,) = gm.graph.find_nodes(op="output")
    return node


def match_of(rule: Rewrite, gm: fx.GraphModule) -> Match:
    """The rule's only match, guards unchecked."""
    (match,) = (m for n in call_nodes(gm) for m in rule.matches(n))
    return match


def assert_untouched(gm: fx.GraphModule, rule: Rewrite, why: str) -> None:
    """The rule does not fire, and leaves no trace."""
    before = lines(gm)
    assert apply((rule,), gm) == 0, f"fired although {why}"
    assert lines(gm) == before, f"left nodes behind although {why}"


def check_hit(entry: Entry, dtype: torch.dtype) -> None:
    """One site; the graph is then what ``after`` traces to, typed and with the module path."""
    gm = graph(entry, dtype)
    types = [lines(gm).splitlines()[-1]] + [str(n.meta["val"].dtype) + str(n.meta["val"].shape)
                                            for n in output_node(gm).args[0]]
    assert apply((entry.rule,), gm) == 1
    assert targets(clean(gm)) == targets(clean(build(entry.rule.after, fakes(entry, dtype))))
    assert types[1:] == [str(n.meta["val"].dtype) + str(n.meta["val"].shape)
                         for n in output_node(gm).args[0]]
    assert all(node.meta["nn_module_stack"] for node in call_nodes(gm))


def corruptions(gm: fx.GraphModule, rule: Rewrite) -> Iterator[tuple[str, fx.GraphModule]]:
    """The graph with one op, one fixed literal or one ``alpha`` altered, each in turn."""
    pattern = [n for n in rule.pattern.nodes if n.op == "call_function"]
    for index, node in enumerate(pattern):
        altered = copy_graph(gm)
        call_nodes(altered)[index].target = aten.hypot.default
        yield f"op of {node.name}", altered
        for place, literal in enumerate(full_args(node)):
            other = {bool: lambda v: not v, int: lambda v: v + 1, list: lambda v: [*v, 1],
                     torch.dtype: lambda v: torch.float16}.get(type(literal))
            if isinstance(literal, list) and any(isinstance(v, fx.Node) for v in literal):
                continue
            if other is not None:
                altered = copy_graph(gm)
                target = call_nodes(altered)[index]
                args = full_args(target)
                args[place] = other(literal)
                target.args, target.kwargs = tuple(args[:place + 1]), {}
                yield f"argument {place} of {node.name}", altered


def check_miss(entry: Entry, dtype: torch.dtype) -> None:
    """Any other op or literal: no site. Operands swapped: no site, or the same values."""
    gm = graph(entry, dtype)
    count = 0
    for what, altered in corruptions(gm, entry.rule):
        count += 1
        assert_untouched(altered, entry.rule, f"{what} was altered")
    assert count >= len(call_nodes(gm))
    for index, node in enumerate(call_nodes(gm)):
        nodes = [i for i, a in enumerate(node.args) if isinstance(a, fx.Node)]
        for first, second in zip(nodes, nodes[1:], strict=False):
            _check_swapped(entry, dtype, gm, (index, first, second))


def _check_swapped(entry: Entry, dtype: torch.dtype, gm: fx.GraphModule,
                   where: tuple[int, int, int]) -> None:
    index, first, second = where
    altered = copy_graph(gm)
    args = list(call_nodes(altered)[index].args)
    args[first], args[second] = args[second], args[first]
    call_nodes(altered)[index].args = tuple(args)
    values = reals(entry, dtype)
    try:
        want = execute(altered, values)
    except (RuntimeError, IndexError, TypeError):
        return  # no valid graph: nothing to preserve
    if apply((entry.rule,), altered):
        assert_equal(execute(altered, values), want)


def check_second_user(entry: Entry, dtype: torch.dtype) -> None:
    """A user outside the match stops it at an inner node, and not at an output."""
    inner = graph(entry, dtype)
    match = match_of(entry.rule, inner)
    outputs = {match.nodes[n] for n in entry.rule.outputs}
    for node in [n for n in match.nodes.values() if n not in outputs]:
        gm = graph(entry, dtype)
        twin = next(n for n in gm.graph.nodes if n.name == node.name)
        out = output_node(gm)
        out.args = ((*out.args[0], twin),)
        assert_untouched(gm, entry.rule, f"inner node {node.name} has a second user")
    gm = graph(entry, dtype)
    out = output_node(gm)
    with gm.graph.inserting_before(out):
        users = [gm.graph.call_function(aten.neg.default, (n,)) for n in out.args[0]]
    for user in users:
        retype(user, MODE)
    out.args = ((*out.args[0], *users),)
    _check_fires(entry, dtype, gm, sites=1)


def _check_fires(entry: Entry, dtype: torch.dtype, gm: fx.GraphModule, sites: int) -> None:
    values = reals(entry, dtype)
    want = execute(gm, values)
    assert apply((entry.rule,), gm) == sites
    assert_equal(execute(clean(gm), values), want)


def check_chain(entry: Entry, dtype: torch.dtype) -> None:
    """Two sites, the second reading what the first returns: both are rewritten."""

    def two(**arguments: object) -> tuple[object, ...]:
        first = entry.rule.before(**arguments)
        second = entry.rule.before(**entry.link(first, arguments))
        return (*results(first), *results(second))

    _check_fires(entry, dtype, build(two, fakes(entry, dtype)), sites=2)


def check_mutation(entry: Entry, dtype: torch.dtype) -> None:
    """A write between matched nodes stops the match, unless it is to something else."""
    names = [name for name, value in fakes(entry, dtype).items() if isinstance(value, Tensor)]
    for name in [*names, "other"]:
        arguments = fakes(entry, dtype) | {"other": fake((3,))}
        gm = build(lambda other, **rest: entry.rule.before(**rest), arguments)
        written = next(n for n in gm.graph.nodes if n.name == name)
        with gm.graph.inserting_before(call_nodes(gm)[-1]):
            write = gm.graph.call_function(aten.copy_.default, (written, written))
        retype(write, MODE)
        if name == "other":
            assert apply((entry.rule,), gm) == 1
        else:
            assert_untouched(gm, entry.rule, f"{name} is written in between")


def check_refused(entry: Entry, dtype: torch.dtype) -> None:
    """Arguments that fit the pattern but not ``when``."""
    for draw in entry.refused:
        gm = build(entry.rule.before, draw(FakeMaker(dtype), random.Random(SIZES)))
        assert match_of(entry.rule, gm)
        assert_untouched(gm, entry.rule, f"``when`` refuses {draw}")


def check_type_guard(entry: Entry, dtype: torch.dtype) -> None:
    """A replacement of another dtype is not made."""

    def wide(**arguments: object) -> object:
        first, *rest = results(entry.rule.after(**arguments))
        return (aten.to.dtype(first, torch.float64), *rest)

    rule = Rewrite(entry.rule.before, wide, entry.rule.when)
    assert_untouched(graph(entry, dtype), rule, "the replacement is float64")


def check_values(entry: Entry, dtype: torch.dtype, seed: int) -> None:
    """``before`` and ``after`` return and write the same values, to the bit."""
    rng = random.Random(seed)
    arguments = entry.draw(RealMaker(dtype, rng), rng)
    runs = []
    for function in (entry.rule.before, entry.rule.after):
        values = clones(arguments)
        with References():
            returned = results(function(**values))
        runs.append(returned + [v for v in values.values() if isinstance(v, Tensor)])
    assert_equal(runs[1], runs[0])


CHECKS = (check_hit, check_miss, check_second_user, check_chain, check_mutation, check_refused,
          check_type_guard)
