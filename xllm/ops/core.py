"""How an op of the vocabulary is declared: schema, meaning, fake, sample inputs, tolerance, cost.

An op is declared once by :func:`define`. Its *reference* is its meaning: the eager backend runs it,
lowering inlines it where a target has no kernel, and every kernel is tested against it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LIBRARY = torch.library.Library("xllm", "DEF")
REGISTRY: dict[str, Op] = {}


@dataclass(frozen=True)
class Tolerance:
    """How far a kernel may be from the reference: ``|a - b| <= absolute + relative * |b|``."""

    relative: float
    absolute: float


EXACT = Tolerance(0.0, 0.0)
ROUNDING = {torch.float32: Tolerance(1e-5, 1e-5), torch.bfloat16: Tolerance(2e-2, 2e-2)}


@dataclass(frozen=True)
class Cost:
    """Work of one call: floating-point operations and bytes read plus written."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Op:
    """One entry of ``torch.ops.xllm``.

    ``sample(rng, dtype)`` draws valid arguments; ``cost(*args)`` counts the work of a call.
    """

    name: str
    schema: str
    reference: Callable[..., object]
    fake: Callable[..., object]
    sample: Callable[[random.Random, torch.dtype], tuple]
    cost: Callable[..., Cost]
    tolerance: dict[torch.dtype, Tolerance]

    @property
    def overload(self) -> torch._ops.OpOverload:
        """The callable that appears as ``node.target`` in graphs."""
        return getattr(torch.ops.xllm, self.name).default


def define(
    schema: str,
    reference: Callable[..., object],
    *,
    sample: Callable[[random.Random, torch.dtype], tuple],
    cost: Callable[..., Cost],
    fake: Callable[..., object] | None = None,
    tolerance: dict[torch.dtype, Tolerance] = ROUNDING,
) -> Op:
    """Declare ``xllm::<schema>`` with ``reference`` as its meaning.

    The reference doubles as the fake where it has no data-dependent control flow.
    Mutated arguments are those that the schema marks ``Tensor(a!)``; no result may alias an input.
    """
    name = schema.split("(", 1)[0]
    op = Op(name, schema, reference, fake or reference, sample, cost, tolerance)
    LIBRARY.define(schema)
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"xllm::{name}", op.fake, lib=LIBRARY)
    REGISTRY[name] = op
    return op


def randn(rng: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Standard normal values of ``shape`` that depend on ``rng`` only."""
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    return torch.randn(shape, generator=generator).to(dtype)


def nbytes(*tensors: Tensor) -> int:
    """Total size in bytes."""
    return sum(t.numel() * t.element_size() for t in tensors)


def elementwise_cost(flops_per_element: int) -> Callable[..., Cost]:
    """Cost of an op that reads its tensors once and writes one result like the first."""

    def cost(x: Tensor, *rest: object) -> Cost:
        others = [t for t in rest if isinstance(t, Tensor)]
        return Cost(flops_per_element * x.numel(), nbytes(x, x, *others))

    return cost
