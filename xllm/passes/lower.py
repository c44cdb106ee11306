"""Lower to what the target runs: its own kernels, and aten for everything else.

    %y = xllm.rms_norm(%x, %w, eps)   ->   the op's reference, in aten ops
    %o = xllm.paged_attention(...)    ->   unchanged where the target has a kernel for it

Level: fused -> lowered. Numerics: exact (a reference is its op's meaning).
"""

from __future__ import annotations

from torch import Tensor, fx

from xllm.graph import placeholders
from xllm.ops import REGISTRY
from xllm.passes.core import ModelFacts, PassContext
from xllm.torch_private import trace_symbolic


class _Inline(fx.Interpreter):
    """Runs a piece with the reference of every op that the target has no kernel for."""

    def __init__(self, gm: fx.GraphModule, kernels: frozenset[str]) -> None:
        super().__init__(gm)
        self.references = {op.overload: op.reference for name, op in REGISTRY.items()
                           if name not in kernels}
        self.sites = 0

    def call_function(self, target: object, args: tuple, kwargs: dict) -> object:
        if target in self.references:
            self.sites += 1
            return self.references[target](*args, **kwargs)
        return super().call_function(target, args, kwargs)


def lower(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Lower to what the target runs: its own kernels, and aten for everything else."""
    inline = _Inline(gm, ctx.target.kernels)
    old = placeholders(gm)
    vals = [node.meta["val"] for node in old]

    def run(*args: Tensor) -> object:
        return inline.run(*args)

    traced = trace_symbolic(run, vals, vals[0].fake_mode)
    for before, after in zip(old, placeholders(traced), strict=True):
        after.meta["bind"] = before.meta["bind"]
        after.name = after.target = before.name
    for node in traced.graph.nodes:
        node.meta.setdefault("val", None)  # ops that return nothing are traced without one
    gm.graph = traced.graph
    return inline.sites


def expected(model: ModelFacts, ctx: PassContext) -> int | None:
    return None
