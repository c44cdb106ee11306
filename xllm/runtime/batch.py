"""One step's work as plain integers: what the scheduler plans and the executor runs."""

from __future__ import annotations

from dataclasses import dataclass, field


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
