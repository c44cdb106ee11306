"""A graph ready to run: the calls of its schedule, one after the other."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from xllm.backends.base import Compiled
from xllm.runtime.loader import BoundCall


@dataclass(frozen=True)
class _Step:
    """One call, bound: fixed arguments in place, the others by name."""

    run: Compiled
    fixed: list[Tensor | None]
    dynamic: list[tuple[int, str]]
    outputs: tuple[str, ...]


class Schedule:
    """The calls of one graph, with the code of one variant of its pieces."""

    def __init__(self, calls: list[BoundCall], pieces: dict[str, Compiled]) -> None:
        self.steps = []
        for call in calls:
            dynamic = [(i, a) for i, a in enumerate(call.arguments) if isinstance(a, str)]
            fixed = [None if isinstance(a, str) else a for a in call.arguments]
            self.steps.append(_Step(pieces[call.piece], fixed, dynamic, call.outputs))

    def run(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run on inputs by name; ``values`` comes back with what the calls define added."""
        for step in self.steps:
            arguments = step.fixed.copy()
            for index, name in step.dynamic:
                arguments[index] = values[name]
            values.update(zip(step.outputs, step.run(arguments), strict=True))
        return values
