"""How many tokens each expert of a mixture was given, summed over steps."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class ExpertLoads:
    """Sums the values ``expert_load.<i>`` that a graph with experts defines, ``[E]`` each."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = [name for name in names if name.startswith("expert_load.")]
        self.total: Tensor | None = None

    def add(self, values: dict[str, Tensor]) -> None:
        """Count one step; what padded rows chose counts too."""
        if self.names:
            loads = torch.stack([values[name] for name in self.names])
            self.total = loads.long() if self.total is None else self.total + loads
