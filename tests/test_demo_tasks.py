"""The demo tasks: the two sides of the split never meet, and the answers are right."""

import json
import subprocess
import sys
from random import Random

import pytest

from xllm.demo.tasks import (
    ALWAYS_HELD_OUT,
    DAY_AFTER,
    TASKS,
    Split,
    add_working,
    draw,
    examples,
    split_of,
    subtract_working,
)
from xllm.demo.words import DAYS

ROUNDS = 300
BOTH = pytest.mark.parametrize("split", list(Split))
EVERY_TASK = pytest.mark.parametrize("task", TASKS)


def items(task: str, split: Split) -> list[tuple[str, str, str]]:
    rng = Random(7)
    return [draw(task, split, rng) for _ in range(ROUNDS)]


def numbers(text: str) -> list[int]:
    return [int(run) for run in "".join(c if c.isdigit() else " " for c in text).split()]


@EVERY_TASK
def test_a_question_is_on_one_side_only(task: str) -> None:
    trained, held_out = (items(task, split) for split in Split)
    assert not {key for key, *_ in trained} & {key for key, *_ in held_out}
    assert not {question for _, question, _ in trained} & {question for _, question, _ in held_out}


@EVERY_TASK
def test_examples_are_distinct_and_repeat_for_a_seed(task: str) -> None:
    pairs = examples(task, Split.HELD_OUT, 50, seed=3)
    assert pairs == examples(task, Split.HELD_OUT, 50, seed=3)
    assert len({question for question, _ in pairs}) == len(pairs) >= 7


def test_some_items_are_always_held_out() -> None:
    assert {split_of(key) for key in ALWAYS_HELD_OUT} == {Split.HELD_OUT}
    assert "What is 17+25?" not in {question for _, question, _ in items("add", Split.TRAIN)}


def test_working_is_shown() -> None:
    assert add_working(17, 25) == "7+5=12, 1+2+1=4, 17+25=42"
    assert add_working(99, 1) == "9+1=10, 9+0+1=10, 99+1=100"
    assert add_working(3, 4) == "3+4=7"
    assert subtract_working(52, 17) == "12-7=5, 5-1-1=3, 52-17=35"
    assert subtract_working(58, 17) == "8-7=1, 5-1=4, 58-17=41"
    assert subtract_working(9, 4) == "9-4=5"


@BOTH
@pytest.mark.parametrize(("task", "sign"), [("add", "+"), ("subtract", "-")])
def test_every_step_of_the_arithmetic_holds(task: str, sign: str, split: Split) -> None:
    for key, question, answer in items(task, split):
        assert sorted(numbers(question)) == sorted(numbers(key))
        for step in answer.split(", "):
            sum_, result = step.split("=")
            first, *others = (int(term) for term in sum_.split(sign))
            assert int(result) == (first + sum(others) if sign == "+" else first - sum(others)) >= 0
        assert sorted(int(term) for term in sum_.split(sign)) == sorted(numbers(question))


@BOTH
def test_words_are_reversed_spelled_and_echoed(split: Split) -> None:
    for _, question, answer in items("reverse", split):
        assert answer[::-1] in question
    for _, question, answer in items("spell", split):
        assert answer.replace(" ", "") in question
        assert all(len(letter) == 1 for letter in answer.split(" "))
    for _, question, answer in items("echo", split):
        assert question.strip('"').endswith(answer)


@BOTH
def test_numbers_are_counted_and_sorted(split: Split) -> None:
    for _, question, answer in items("count", split):
        start, end = numbers(question)
        assert numbers(answer) == list(range(start, end + 1))
    for _, question, answer in items("sort", split):
        assert numbers(answer) == sorted(numbers(question))


@BOTH
def test_the_next_day_follows(split: Split) -> None:
    for _, question, answer in items("day_after", split):
        (day,) = (day for day in DAYS if day in question)
        assert answer == DAYS[(DAYS.index(day) + 1) % 7]


def test_every_day_is_trained_in_some_phrasing() -> None:
    for day in range(7):
        keys = [f"day {day} {phrasing}" for phrasing in range(len(DAY_AFTER))]
        assert Split.TRAIN in {split_of(key) for key in keys}


@BOTH
def test_json_holds_the_record(split: Split) -> None:
    for _, question, answer in items("json", split):
        record = json.loads(answer)
        assert 2 <= len(record) <= 4
        described = ", ".join(f"{field} {value}" for field, value in record.items())
        assert question.rstrip(".").endswith(described)


def test_the_package_imports_no_torch() -> None:
    code = "import sys, xllm.demo, xllm.demo.tasks; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
