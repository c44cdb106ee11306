"""Write view shapes with literals and at most one -1, so that no sizes travel between nodes.

    %s = aten.sym_size(%ids, 1); %v = aten.view(%x, [1, %s, -1, 128])
    ->   %v = aten.view(%x, [1, -1, 16, 128])

Layers then have equal text and can be rolled up.

Level: captured -> captured. Numerics: exact.
"""

from __future__ import annotations

import torch
from torch import fx

from xllm.graph import calls_of
from xllm.passes.core import ModelFacts, PassContext

aten = torch.ops.aten


def _literal_shape(node: fx.Node) -> list[int] | None:
    """The node's shape with its only symbolic size as -1; None where two are symbolic."""
    shape = [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]
    return shape if shape.count(-1) <= 1 else None


def static_views(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Write view shapes with literals and at most one -1."""
    sites = 0
    for node in calls_of(gm, aten.view.default, aten.reshape.default):
        shape = _literal_shape(node)
        if shape is not None and list(node.args[1]) != shape:
            node.args = (node.args[0], shape)
            sites += 1
    return sites


def expected(model: ModelFacts, ctx: PassContext) -> int | None:
    return None
