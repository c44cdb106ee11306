"""The executor that runs an artifact: schedule, persistent buffers, KV cache, buckets."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xllm.artifact import Artifact
from xllm.graph import INPUT_DTYPES
from xllm.runtime.batch import Batch
from xllm.runtime.encoder import Encoder
from xllm.runtime.executor import Limits
from xllm.runtime.expert_loads import ExpertLoads
from xllm.runtime.loader import Loaded
from xllm.runtime.schedule import Schedule
from xllm.targets import DTYPES


@dataclass(frozen=True)
class Bucket:
    """A row of the bucket table: steps of up to ``tokens`` tokens run ``variant``.

    A ``padded`` variant was compiled for exactly that many one-token sequences.
    """

    tokens: int
    variant: str
    padded: bool


class Inputs:
    """The persistent buffers that every graph reads; sized for the largest step.

    ``no_image [1, H]`` stands for the image embeddings in a step without any; None for a model
    that takes no images.
    """

    def __init__(self, limits: Limits, no_image: Tensor | None = None) -> None:
        self.no_image = no_image
        width = -(-limits.context_length // limits.page_size)
        sizes = {
            "input_ids": limits.max_tokens, "positions": limits.max_tokens,
            "slot_mapping": limits.max_tokens, "query_start_loc": limits.max_sequences + 1,
            "seq_lens": limits.max_sequences, "logits_rows": limits.max_tokens,
            "block_table": limits.max_sequences * width,
        }
        if no_image is not None:
            sizes |= {"mrope_positions": 3 * limits.max_tokens, "image_rows": limits.max_tokens}
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
        return views if self.no_image is None else views | self._fill_images(batch)

    def _fill_images(self, batch: Batch) -> dict[str, Tensor]:
        positions = batch.mrope_positions or [(p, p, p) for p in batch.positions]
        by_axis = [p[axis] for axis in range(3) for p in positions]
        embeds = self.no_image if batch.image_embeds is None else batch.image_embeds
        return {
            "mrope_positions": self._put("mrope_positions", by_axis).view(3, 1, -1),
            "image_rows": self._put("image_rows",
                                    batch.image_rows or [-1] * len(batch.input_ids)),
            "image_embeds": embeds,
        }

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
        image_rows=batch.image_rows + [-1] * extra if batch.image_rows else [],
        image_embeds=batch.image_embeds,
        mrope_positions=batch.mrope_positions + [(0, 0, 0)] * extra
        if batch.mrope_positions else [],
    )


@dataclass(frozen=True)
class _Done:
    """A finished step."""

    logits_RV: Tensor
    hidden_RH: Tensor

    def logits(self) -> Tensor:
        return self.logits_RV

    def hidden(self) -> Tensor:
        return self.hidden_RH


def _no_image(pieces: dict) -> Tensor | None:
    """One row of zeros like those of the graph's input ``image_embeds``; None if it has none."""
    for piece in pieces.values():
        for row in piece["signature"]:
            if row["bind"] == {"input": "image_embeds"}:
                dtype = DTYPES[row["dtype"].removeprefix("torch.")]
                return torch.zeros(1, row["shape"][1], dtype=dtype)
    return None


class ArtifactExecutor:
    """Runs batches through an artifact's compiled pieces; ``encoder`` runs those of images."""

    def __init__(self, artifact: Artifact, loaded: Loaded, limits: Limits,
                 encoder: Encoder | None = None) -> None:
        self.limits = limits
        self.encoder = encoder
        self.inputs = Inputs(limits, _no_image(artifact.manifest["pieces"]))
        self.buckets = [Bucket(**row) for row in artifact.manifest["buckets"]]
        self.schedules = {name: Schedule(loaded.calls, pieces)
                          for name, pieces in loaded.variants.items()}
        self.launches: dict[str, int] = dict.fromkeys(self.schedules, 0)
        self._loads = ExpertLoads(name for call in loaded.calls for name in call.outputs)

    def expert_loads(self) -> Tensor | None:
        """Tokens per expert since the start, ``[layers, E]``; None before the first step, and for
        models without experts."""
        return self._loads.total

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
        self._loads.add(self.schedules[bucket.variant].run(values))
        return _Done(values["logits"][:rows], values["hidden"][:rows])

