"""FakeExecutor: right batches give the model's logits, wrong bookkeeping does not."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from tests.runtime.runtime_types import MakeLimits
from xllm.runtime.batch import Batch
from xllm.runtime.fake import BatchError, FakeExecutor, hashed_model

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]


def batches() -> list[Batch]:
    """Eight tokens in three chunks, on pages 2 and 5 of four tokens."""
    slots = [8, 9, 10, 11, 20, 21, 22, 23]
    made = []
    for start, end in ((0, 3), (3, 7), (7, 8)):
        made.append(Batch(
            TOKENS[start:end], list(range(start, end)), slots[start:end], [0, end - start], [end],
            [[2, 5][: -(-end // 4)]], [end - start - 1]))
    return made


@pytest.fixture
def executor(make_limits: MakeLimits) -> FakeExecutor:
    return FakeExecutor(make_limits(page_size=4, num_pages=8, vocab_size=11))


def test_chunks_see_the_whole_history(executor: FakeExecutor) -> None:
    model = hashed_model(11)
    for batch, end in zip(batches(), (3, 7, 8)):
        assert torch.equal(executor.launch(batch).logits(), model(TOKENS[:end]).unsqueeze(0))


def wrong_slot(step: list[Batch]) -> None:
    step[1].slot_mapping[0], step[1].slot_mapping[1] = 20, 11


def wrong_page(step: list[Batch]) -> None:
    step[2].block_tables[0] = [2, 6]


def wrong_order(step: list[Batch]) -> None:
    step[2].block_tables[0] = [5, 2]


def wrong_position(step: list[Batch]) -> None:
    step[1].positions[2] += 1


def wrong_token(step: list[Batch]) -> None:
    step[0].input_ids[1] += 1


def page_shared(step: list[Batch]) -> None:
    step.insert(2, Batch([7], [0], [8], [0, 1], [1], [[2]], [0]))


def chunk_skipped(step: list[Batch]) -> None:
    del step[0]


@pytest.mark.parametrize("damage", [wrong_slot, wrong_page, wrong_order, wrong_position,
                                    wrong_token, page_shared, chunk_skipped])
def test_wrong_bookkeeping_changes_the_logits(
    executor: FakeExecutor, damage: Callable[[list[Batch]], None]
) -> None:
    steps = batches()
    damage(steps)
    results = [executor.launch(batch).logits() for batch in steps]
    assert not torch.equal(results[-1], hashed_model(11)(TOKENS).unsqueeze(0))


@pytest.mark.parametrize(("field", "value", "problem"), [
    ("input_ids", [], "no tokens"), ("input_ids", [1] * 40, "40 tokens of 32"),
    ("input_ids", [1, 2, 11], "token ids"), ("positions", [0, 1], "ragged"),
    ("slot_mapping", [8, 8, 9], "slots shared"), ("query_start_loc", [0, 2], "query_start_loc"),
    ("query_start_loc", [0, 0, 3], "query_start_loc"), ("logits_rows", [3], "logits rows"),
    ("block_tables", [], "block tables"), ("block_tables", [[0]], r"pages \[0\]"),
    ("block_tables", [[8]], r"pages \[8\]"), ("block_tables", [[1, 2]], "2 pages for 3 tokens"),
    ("seq_lens", [2], "length 2, 3 tokens new"), ("seq_lens", [257], "length 257"),
])
def test_malformed_batches_are_refused(
    executor: FakeExecutor, field: str, value: list[object], problem: str
) -> None:
    batch = copy.deepcopy(batches()[0])
    setattr(batch, field, value)
    with pytest.raises(BatchError, match=problem):
        executor.launch(batch)


def test_a_batch_may_want_no_logits(executor: FakeExecutor) -> None:
    batch = batches()[0]
    batch.logits_rows = []
    assert executor.launch(batch).logits().shape == (0, 11)
