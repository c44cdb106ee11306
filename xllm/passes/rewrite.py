"""``Rewrite(before, after, when)``: two functions on tensors, and the matcher that swaps them.

Both functions are executable, so a test can compare them on values. A parameter of ``before``
binds a tensor or, where the pattern uses it as one, any literal (a number, a shape). ``before``
may return several values; ops that mutate are outputs too.

Guards, besides ``when``:

* *second user*: a matched node that is not an output must have no user outside the match;
* *mutation*: no other op between the first and the last matched node may write to a tensor that
  the match reads or writes, or read one that the match writes, directly or through views;
* *type*: each replacement must have the dtype and shape of what it replaces.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import fx

from xllm.graph import retype
from xllm.torch_private import same_type


class NotATensor(Exception):
    """A parameter that ``when`` wants as a tensor is bound to a literal: no match."""


@dataclass
class Match:
    """Where a pattern was found: pattern nodes and parameters by what they stand for."""

    nodes: dict[fx.Node, fx.Node] = field(default_factory=dict)
    binding: dict[str, object] = field(default_factory=dict)

    def val(self, name: str) -> torch.Tensor:
        """Fake tensor of a bound parameter; raises :class:`NotATensor` for a literal."""
        value = self.binding[name]
        if not isinstance(value, fx.Node):
            raise NotATensor(name)
        return value.meta["val"]

    def inputs(self) -> list[fx.Node]:
        """Bound nodes, those inside bound lists too."""
        found: list[fx.Node] = []
        fx.node.map_arg(list(self.binding.values()), found.append)
        return found

    def copy(self) -> Match:
        return Match(dict(self.nodes), dict(self.binding))


def full_args(node: fx.Node) -> list[object]:
    """Arguments in schema order, defaults filled in."""
    args = list(node.args)
    if isinstance(node.target, torch._ops.OpOverload):
        for argument in node.target._schema.arguments[len(args):]:
            args.append(node.kwargs.get(argument.name, argument.default_value))
    return args


def mutates(node: fx.Node) -> bool:
    """Whether a node writes to one of its arguments."""
    is_op = node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
    return is_op and node.target._schema.is_mutable


def _written(node: fx.Node) -> set[fx.Node]:
    """What a node writes to, by :func:`_base`."""
    if not mutates(node):
        return set()
    arguments = zip(node.target._schema.arguments, full_args(node), strict=True)
    return {_base(a) for s, a in arguments if s.alias_info is not None and s.alias_info.is_write}


def _base(node: fx.Node) -> fx.Node:
    """The node that owns the memory of ``node``: views are followed to what they may view."""
    while node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
        is_op = isinstance(node.target, torch._ops.OpOverload)
        aliases = is_op and any(r.alias_info is not None for r in node.target._schema.returns)
        if not aliases and node.target is not operator.getitem:
            break
        node = node.args[0]
    return node


@dataclass(frozen=True)
class Rewrite:
    """Replace occurrences of ``before`` by ``after`` where ``when(match)`` holds."""

    before: Callable[..., object]
    after: Callable[..., object]
    when: Callable[[Match], bool] = lambda match: True

    @cached_property
    def pattern(self) -> fx.Graph:
        """``before`` as a graph."""
        return fx.symbolic_trace(self.before).graph

    @cached_property
    def outputs(self) -> list[fx.Node]:
        """Pattern nodes whose values (or effects) leave the match; the first is the anchor."""
        returned = next(n for n in self.pattern.nodes if n.op == "output").args[0]
        values = list(returned) if isinstance(returned, (tuple, list)) else [returned]
        return values + [n for n in self.pattern.nodes if mutates(n) and n not in values]

    def matches(self, anchor: fx.Node) -> Iterator[Match]:
        """Ways to match with ``anchor`` as the first output, guards not yet checked."""
        start = Match()
        if _unify(self.outputs[0], anchor, start):
            yield from self._rest(start, self.outputs[1:], anchor.graph)

    def _rest(self, match: Match, outputs: list[fx.Node], graph: fx.Graph) -> Iterator[Match]:
        if not outputs:
            yield match
        elif outputs[0] in match.nodes:
            yield from self._rest(match, outputs[1:], graph)
        else:
            for node in graph.find_nodes(op="call_function", target=outputs[0].target):
                attempt = match.copy()
                if _unify(outputs[0], node, attempt):
                    yield from self._rest(attempt, outputs[1:], graph)

    def site(self, anchor: fx.Node) -> Match | None:
        """The first match at ``anchor`` that passes the guards."""
        for match in self.matches(anchor):
            if self._alone(match) and _undisturbed(match) and self._wanted(match):
                return match
        return None

    def _wanted(self, match: Match) -> bool:
        """``when`` holds, and no parameter stands for a value that the match itself makes."""
        if any(v in match.nodes.values() for v in match.binding.values()
               if isinstance(v, fx.Node)):
            return False
        try:
            return self.when(match)
        except NotATensor:
            return False

    def _alone(self, match: Match) -> bool:
        inside = set(match.nodes.values())
        outputs = {match.nodes[n] for n in self.outputs}
        return all(set(n.users) <= inside for n in inside - outputs)


def _unify(pattern: object, actual: object, match: Match) -> bool:
    """Whether ``actual`` fits ``pattern`` under (and extending) the bindings so far."""
    if isinstance(pattern, fx.Node):
        if pattern.op == "placeholder":
            if pattern.name in match.binding:
                return _same(match.binding[pattern.name], actual)
            match.binding[pattern.name] = actual
            return True
        if pattern in match.nodes:
            return match.nodes[pattern] is actual
        if not isinstance(actual, fx.Node) or actual.op != "call_function":
            return False
        if actual.target != pattern.target or actual in match.nodes.values():
            return False
        match.nodes[pattern] = actual
        return _unify(full_args(pattern), full_args(actual), match)
    if isinstance(pattern, (list, tuple)):
        return (isinstance(actual, (list, tuple)) and len(pattern) == len(actual)
                and all(_unify(p, a, match) for p, a in zip(pattern, actual, strict=True)))
    return _same(pattern, actual)


def _same(a: object, b: object) -> bool:
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        return a is b
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and a == b


def _undisturbed(match: Match) -> bool:
    """No foreign write, between the matched nodes, to anything that the match touches, and no
    foreign read of anything that it writes."""
    inside = set(match.nodes.values())
    touched = {_base(node) for node in inside.union(match.inputs())}
    written = {base for node in inside for base in _written(node)}
    seen = 0
    for node in next(iter(inside)).graph.nodes:
        seen += node in inside
        if 0 < seen < len(inside) and node not in inside:
            if _written(node) & touched or written & set(map(_base, node.all_input_nodes)):
                return False
    return True


def apply(rules: tuple[Rewrite, ...], gm: fx.GraphModule) -> int:
    """Apply the first rule that matches at each node, in graph order; returns the sites."""
    sites = 0
    gone: set[fx.Node] = set()
    for node in list(gm.graph.nodes):
        if node in gone or node.op != "call_function":
            continue
        for rule in rules:
            match = rule.site(node)
            if match is not None and _replace(rule, match, gm, gone):
                sites += 1
                break
    return sites


def _insertion_point(rule: Rewrite, match: Match) -> fx.Node | None:
    """The node to insert before: behind all inputs and before all outside users of outputs."""
    inside = set(match.nodes.values())
    users = {u for n in rule.outputs for u in match.nodes[n].users if u not in inside}
    last_matched = max(inside)  # nodes compare by their position in the graph
    point = min(users | {last_matched.next})
    return point if all(node < point for node in match.inputs()) else None


def _replace(rule: Rewrite, match: Match, gm: fx.GraphModule, gone: set[fx.Node]) -> bool:
    point = _insertion_point(rule, match)
    if point is None:
        return False
    anchor = match.nodes[rule.outputs[0]]
    tracer = fx.proxy.GraphAppendingTracer(gm.graph)
    arguments = {name: fx.node.map_arg(value, lambda node: fx.Proxy(node, tracer))
                 for name, value in match.binding.items()}
    previous = point.prev
    with gm.graph.inserting_before(point):
        result = rule.after(**arguments)
    new = _new_nodes(previous, point)
    results = list(result) if isinstance(result, (tuple, list)) else [result]
    for node in new:
        node.meta["nn_module_stack"] = anchor.meta.get("nn_module_stack", {})
        retype(node, anchor.meta["val"].fake_mode if isinstance(anchor.meta["val"], torch.Tensor)
               else _any_mode(anchor))
    pairs = [(match.nodes[old], value.node)
             for old, value in zip(rule.outputs, results, strict=False)]
    if not all(same_type(old.meta["val"], value.meta["val"]) for old, value in pairs):
        for node in reversed(new):
            gm.graph.erase_node(node)
        return False
    for old, value in pairs:
        old.replace_all_uses_with(value)
    for node in sorted(match.nodes.values(), reverse=True):
        if not node.users:
            gm.graph.erase_node(node)
            gone.add(node)
    return True


def _any_mode(node: fx.Node) -> object:
    return next(a.meta["val"].fake_mode for a in node.all_input_nodes
                if isinstance(a.meta["val"], torch.Tensor))


def _new_nodes(previous: fx.Node, point: fx.Node) -> list[fx.Node]:
    nodes, node = [], previous.next
    while node is not point:
        nodes.append(node)
        node = node.next
    return nodes
