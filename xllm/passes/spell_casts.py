"""Write every change of dtype as ``aten.to.dtype``, with the dtype in plain sight.

    %y = aten.type_as(%x, %like)   ->   %y = aten.to.dtype(%x, bfloat16)

Level: captured -> captured. Numerics: exact.
"""

from __future__ import annotations

import torch
from torch import fx

from xllm.graph import calls_of
from xllm.passes.core import ModelFacts, PassContext

aten = torch.ops.aten


def spell_casts(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Write every change of dtype as ``aten.to.dtype``."""
    sites = 0
    for node in calls_of(gm, aten.type_as.default):
        node.target = aten.to.dtype
        node.args = (node.args[0], node.meta["val"].dtype)
        sites += 1
    return sites


def expected(model: ModelFacts, ctx: PassContext) -> int | None:
    return None
