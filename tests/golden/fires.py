"""How often each pass fires on the tiny models: family → dtype → pass → sites."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.tiny import case_id, stages
from xllm.passes.core import PassContext

FILE = Path(__file__).with_name("fires.json")
Counts = dict[str, int]


def measure(family: str, dtype: torch.dtype) -> Counts:
    """Sites per pass on the CPU; a pass that runs twice has a number behind its name."""
    counts: Counts = {}
    for record in stages(family, dtype)[1][1:]:
        again = sum(name.split(" ")[0] == record.name for name in counts)
        counts[f"{record.name} {again + 1}" if again else record.name] = record.sites
    return counts


def context_of(family: str, dtype: torch.dtype) -> PassContext:
    """The pass context of a tiny model."""
    return stages(family, dtype)[2]


def load() -> dict[str, dict[str, dict[str, Counts]]]:
    """The stored counts: family → target → dtype → pass."""
    return json.loads(FILE.read_text())


def store(cases: list[tuple[str, torch.dtype]]) -> None:
    """Measure and write the file."""
    table: dict[str, dict[str, dict[str, Counts]]] = {}
    for family, dtype in cases:
        targets = table.setdefault(family, {})
        dtypes = targets.setdefault(context_of(family, dtype).target.name, {})
        dtypes[case_id(dtype)] = measure(family, dtype)
    FILE.write_text(json.dumps(table, indent=1) + "\n")
