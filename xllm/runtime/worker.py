"""The executor that runs an artifact: schedule, persistent buffers, KV cache, buckets."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xllm.artifact import Artifact
from xllm.backends.base import Compiled
from xllm.graph import INPUT_DTYPES
from xllm.runtime.batch import Batch
from xllm.runtime.executor import Limits
from xllm.runtime.loader import Loaded


@dataclass(frozen=True)
class Bucket:
    """A row of the bucket table: steps of up to ``tokens`` tokens run ``variant``.

    A ``padded`` variant was compiled for exactly that many one-token sequences.
    """

    tokens: int
    variant: str
    padded: bool


class Inputs:
    """The persistent buffers that every graph reads; sized for the largest step."""

    def __init__(self, limits: Limits) -> None:
        width = -(-limits.context_length // limits.page_size)
        sizes = {
            "input_ids": limits.max_tokens, "positions": limits.max_tokens,
            "slot_mapping": limits.max_tokens, "query_start_loc": limits.max_sequences + 1,
            "seq_lens": limits.max_sequences, "logits_rows": limits.max_tokens,
            "block_table": limits.max_sequences * width,
        }
        self.buffers = {name: torch.zeros(n, dtype=INPUT_DTYPES[name]) for name, n in sizes.items()}

    def fill(self, batch: Batch) -> dict[str, Tensor]:
        """Copy a batch into the buffers; views of the exact size, by input name."""
        width = max(map(len, batch.block_tables), default=1)
        table = [page for row in batch.block_tables for page in row + [0] * (width - len(row))]
        views = {
            "input_ids": self._put("input_ids", batch.input_ids).unsqueeze(0),
            "positions": self._put("positions", batch.positions).unsqueeze(0),
            "block_table": self._put("block_table", table).view(-1, width),
        }
        for name in ("slot_mapping", "query_start_loc", "seq_lens", "logits_rows"):
            views[name] = self._put(name, vars(batch)[name])
        return views

    def _put(self, name: str, values: list[int]) -> Tensor:
        view = self.buffers[name][: len(values)]
        view.copy_(torch.tensor(values, dtype=INPUT_DTYPES[name]))
        return view


def pad(batch: Batch, tokens: int) -> Batch:
    """The batch with one-token sequences added up to ``tokens``; they write to page 0."""
    extra = tokens - len(batch.input_ids)
    start = batch.query_start_loc[-1]
    return Batch(
        input_ids=batch.input_ids + [0] * extra,
        positions=batch.positions + [0] * extra,
        slot_mapping=batch.slot_mapping + [0] * extra,
        query_start_loc=batch.query_start_loc + [start + i + 1 for i in range(extra)],
        seq_lens=batch.seq_lens + [1] * extra,
        block_tables=batch.block_tables + [[0]] * extra,
        logits_rows=batch.logits_rows + [start + i for i in range(extra)],
    )


@dataclass(frozen=True)
class _Step:
    """One call of the schedule, bound: fixed arguments in place, the others by name."""

    run: Compiled
    fixed: list[Tensor | None]
    dynamic: list[tuple[int, str]]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class _Done:
    """A finished step."""

    result: Tensor

    def logits(self) -> Tensor:
        return self.result


class ArtifactExecutor:
    """Runs batches through an artifact's compiled pieces."""

    def __init__(self, artifact: Artifact, loaded: Loaded, limits: Limits) -> None:
        self.limits = limits
        self.inputs = Inputs(limits)
        self.buckets = [Bucket(**row) for row in artifact.manifest["buckets"]]
        self.steps = {name: self._bind(loaded, pieces) for name, pieces in loaded.variants.items()}
        self.launches: dict[str, int] = dict.fromkeys(self.steps, 0)

    @staticmethod
    def _bind(loaded: Loaded, pieces: dict[str, Compiled]) -> list[_Step]:
        steps = []
        for call in loaded.calls:
            dynamic = [(i, a) for i, a in enumerate(call.arguments) if isinstance(a, str)]
            fixed = [None if isinstance(a, str) else a for a in call.arguments]
            steps.append(_Step(pieces[call.piece], fixed, dynamic, call.outputs))
        return steps

    def bucket(self, batch: Batch) -> Bucket:
        """The smallest bucket that fits; padded ones take one-token sequences only."""
        tokens = len(batch.input_ids)
        decode = tokens == len(batch.seq_lens) == len(batch.logits_rows)
        return next(b for b in self.buckets if b.tokens >= tokens and (decode or not b.padded))

    def launch(self, batch: Batch) -> _Done:
        """Run one step; logits float32 ``[R, V]``."""
        bucket = self.bucket(batch)
        rows = len(batch.logits_rows)
        if rows == 0:  # a prompt's inner chunk; graphs are compiled for one row or more
            batch = replace(batch, logits_rows=[0])
        values = self.inputs.fill(pad(batch, bucket.tokens) if bucket.padded else batch)
        self.launches[bucket.variant] += 1
        for step in self.steps[bucket.variant]:
            arguments = step.fixed.copy()
            for index, name in step.dynamic:
                arguments[index] = values[name]
            values.update(zip(step.outputs, step.run(arguments), strict=True))
        return _Done(values["logits"][:rows])

