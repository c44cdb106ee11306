"""build_batch: slots, positions and rows of a prefill chunk beside a decode."""

from __future__ import annotations

from xllm.runtime.batch import Chunk, build_batch
from xllm.runtime.request import Request
from xllm.runtime.sampling_params import SamplingParams


def request(tokens: list[int], pages: list[int]) -> Request:
    made = Request("r", tokens, SamplingParams(), 100)
    made.block_table = pages
    return made


def test_decode_and_chunk() -> None:
    decode = request([5, 6, 7, 8, 9], [3, 1])
    prefill = request([10, 11, 12, 13, 14, 15, 16], [2, 4])
    chunks = [Chunk(decode, 4, 1, samples=True), Chunk(prefill, 2, 3, samples=False)]
    batch = build_batch(chunks, page_size=4)
    assert batch.input_ids == [9, 12, 13, 14]
    assert batch.positions == [4, 2, 3, 4]
    assert batch.slot_mapping == [1 * 4 + 0, 2 * 4 + 2, 2 * 4 + 3, 4 * 4 + 0]
    assert batch.query_start_loc == [0, 1, 4]
    assert batch.seq_lens == [5, 5]
    assert batch.block_tables == [[3, 1], [2, 4]]
    assert batch.logits_rows == [0]


def test_tables_are_cut_to_the_tokens_and_copied() -> None:
    held = request([1, 2, 3], [7, 8, 9])
    batch = build_batch([Chunk(held, 0, 3, samples=True)], page_size=2)
    assert batch.block_tables == [[7, 8]] and batch.logits_rows == [2]
    held.block_table.clear()
    assert batch.block_tables == [[7, 8]]
