"""One step's work as plain integers: what the scheduler plans and the executor runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from xllm.runtime.request import Request


@dataclass
class Batch:
    """A ragged batch of S sequences with T new tokens in all, R of whose logits are wanted.

    ``query_start_loc`` has S + 1 entries; ``seq_lens[s]`` counts cached plus new tokens of
    sequence s; ``block_tables[s]`` lists the KV pages of its tokens in order (page 0 is never
    used); ``slot_mapping[t] = page * page_size + offset`` is where token t's key and value go;
    ``logits_rows`` are indices into the T tokens, in the order the caller wants the logits.
    """

    input_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    slot_mapping: list[int] = field(default_factory=list)
    query_start_loc: list[int] = field(default_factory=lambda: [0])
    seq_lens: list[int] = field(default_factory=list)
    block_tables: list[list[int]] = field(default_factory=list)
    logits_rows: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Chunk:
    """Tokens ``start`` to ``start + count`` of one request, run in one step.

    ``samples`` says that the chunk ends with the last known token, so the next one is drawn.
    """

    request: Request
    start: int
    count: int
    samples: bool


def build_batch(chunks: Sequence[Chunk], page_size: int) -> Batch:
    """Lay the chunks out one after the other; their requests already hold the pages."""
    batch = Batch()
    for chunk in chunks:
        request, end = chunk.request, chunk.start + chunk.count
        table = request.block_table
        batch.input_ids += request.token_ids[chunk.start : end]
        batch.positions += range(chunk.start, end)
        batch.slot_mapping += (
            table[position // page_size] * page_size + position % page_size
            for position in range(chunk.start, end)
        )
        batch.query_start_loc.append(len(batch.input_ids))
        batch.seq_lens.append(end)
        batch.block_tables.append(table[: -(-end // page_size)])
        if chunk.samples:
            batch.logits_rows.append(len(batch.input_ids) - 1)
    return batch
