"""Common subexpressions: compute the same thing once.

    %a = aten.unsqueeze(%cos, 1); %b = aten.unsqueeze(%cos, 1)   ->   %a used for both

Ops that write, and everything that reads what was written in between, are left alone.

Level: captured -> captured. Numerics: exact.
"""

from __future__ import annotations

import torch
from torch import fx

from xllm.passes.core import ModelFacts, PassContext
from xllm.passes.rewrite import full_args, mutates


def _key(node: fx.Node) -> tuple:
    def freeze(value: object) -> object:
        if isinstance(value, (list, tuple)):
            return tuple(freeze(v) for v in value)
        return (type(value).__name__, value)

    return node.target, freeze(full_args(node)), freeze(sorted(node.kwargs.items()))


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def cse(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Compute the same thing once."""
    sites = 0
    seen: dict[tuple, fx.Node] = {}
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or _is_random(node) or any(map(mutates, node.users)):
            continue
        if mutates(node):
            seen.clear()
            continue
        first = seen.setdefault(_key(node), node)
        if first is not node:
            node.replace_all_uses_with(first)
            gm.graph.erase_node(node)
            sites += 1
    return sites


def expected(model: ModelFacts, ctx: PassContext) -> int | None:
    return None
