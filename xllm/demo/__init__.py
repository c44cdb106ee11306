"""A tiny trained chat model that ships with the package: `CHECKPOINT` is its directory."""

from pathlib import Path

CHECKPOINT: Path = Path(__file__).parent / "checkpoint"
