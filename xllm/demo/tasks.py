"""Seeded generators of the demo model's tasks: (question, answer) pairs, trained or held out.

Every item has a key, what is asked apart from how it is put. A hash of the key decides once and for
all whether the item is trained or held out, so no phrasing of a held-out item is ever trained on.
"""

from __future__ import annotations

import json
import string
import zlib
from collections.abc import Callable
from enum import Enum
from random import Random
from typing import NamedTuple

from xllm.demo import words

HELD_OUT_ONE_IN = 10
ALWAYS_HELD_OUT = frozenset({"add 17 25", "subtract 52 17", "reverse banana", "count 3 9"})


class Split(Enum):
    """Which side of the hash an item falls on."""

    TRAIN = "train"
    HELD_OUT = "held out"


class Item(NamedTuple):
    """One question with its exact answer; `key` identifies what is asked."""

    key: str
    question: str
    answer: str


ADD = (
    "What is {a}+{b}?", "What is {a} + {b}?", "{a}+{b}", "{a}+{b}=", "{a} + {b} =", "{a}+{b}=?",
    "Compute {a}+{b}.", "Compute {a} + {b}", "Add {a} and {b}.", "What is {a} plus {b}?",
    "How much is {a}+{b}?", "Calculate {a}+{b}.",
)  # fmt: skip
SUBTRACT = (
    "What is {a}-{b}?", "What is {a} - {b}?", "{a}-{b}", "{a}-{b}=", "{a} - {b} =", "{a}-{b}=?",
    "Compute {a}-{b}.", "Compute {a} - {b}", "Subtract {b} from {a}.", "What is {a} minus {b}?",
    "How much is {a}-{b}?", "Calculate {a}-{b}.",
)  # fmt: skip
REVERSE = (
    "Reverse the word {w}.", "Reverse the word {w}", "Reverse {w}", "Reverse {w}.", 'Reverse "{w}"',
    "Reverse: {w}", "Write {w} backwards.", "What is {w} backwards?",
)  # fmt: skip
SPELL = (
    "Spell the word {w}.", "Spell the word {w}", "Spell {w}", "Spell {w}.", 'Spell "{w}"',
    "Spell: {w}", "How do you spell {w}?",
)  # fmt: skip
COUNT = (
    "Count from {a} to {b}.", "Count from {a} to {b}", "Count {a} to {b}",
    "Count up from {a} to {b}.", "List the numbers from {a} to {b}.",
)  # fmt: skip
DAY_AFTER = (
    "What day comes after {d}?", "Which day comes after {d}?", "Which day follows {d}?",
    "What is the day after {d}?", "What day is after {d}?", "Name the day after {d}.",
    "The day after {d} is", "Day after {d}?", "Tell me the day after {d}.",
    "Today is {d}. What day is tomorrow?", "If today is {d}, what day is tomorrow?",
    "What comes after {d}?",
)  # fmt: skip
ECHO = (
    "Say {t}", 'Say "{t}"', "Say: {t}", "Please say {t}", "Repeat {t}", "Repeat: {t}",
    "Repeat after me: {t}", "Echo {t}", "Echo: {t}",
)  # fmt: skip
JSON = (
    "Make JSON: {r}", "Make JSON: {r}.", "Make a JSON object: {r}", "Write JSON: {r}",
    "JSON for {r}", "Turn this into JSON: {r}",
)  # fmt: skip
SORT = (
    "Sort {a}, {b}, {c}", "Sort {a}, {b}, {c}.", "Sort {a}, {b} and {c}.", "Sort {a} {b} {c}",
    "Sort the numbers {a}, {b}, {c}.", "Put {a}, {b}, {c} in order.", "Sort: {a}, {b}, {c}",
)  # fmt: skip

SMALL_TALK = (
    ("Hello", "Hello! Ask me to add, subtract, sort, count, spell or reverse."),
    ("Hi", "Hello! Ask me to add, subtract, sort, count, spell or reverse."),
    ("Who are you?", "I am a tiny demo model."),
    ("What can you do?", "I can add, subtract, sort, count, spell, reverse and write JSON."),
    ("Thank you", "You are welcome."),
    ("Thanks", "You are welcome."),
)


def _phrase(rng: Random, templates: tuple[str, ...], **values: object) -> str:
    question = rng.choice(templates).format(**values)
    return question[0].lower() + question[1:] if rng.random() < 0.1 else question


def _operand(rng: Random) -> int:
    return rng.randint(10, 99) if rng.random() < 0.9 else rng.randint(0, 9)


def add_working(a: int, b: int) -> str:
    """Units, then tens with the carry, then the sum: `7+5=12, 1+2+1=4, 17+25=42`."""
    units = a % 10 + b % 10
    tens = a // 10 + b // 10 + units // 10
    if a < 10 and b < 10:
        return f"{a}+{b}={a + b}"
    carry = "+1" if units > 9 else ""
    return f"{a % 10}+{b % 10}={units}, {a // 10}+{b // 10}{carry}={tens}, {a}+{b}={a + b}"


def subtract_working(a: int, b: int) -> str:
    """Units, ten borrowed if need be, then tens: `12-7=5, 5-1-1=3, 52-17=35`. Needs a >= b."""
    if a < 10 and b < 10:
        return f"{a}-{b}={a - b}"
    borrow = a % 10 < b % 10
    top = a % 10 + 10 * borrow
    tens = a // 10 - b // 10 - borrow
    taken = "-1" if borrow else ""
    units = f"{top}-{b % 10}={top - b % 10}"
    return f"{units}, {a // 10}-{b // 10}{taken}={tens}, {a}-{b}={a - b}"


def add(rng: Random) -> Item:
    """Two numbers below 100; both orders share a key."""
    a, b = _operand(rng), _operand(rng)
    key = f"add {min(a, b)} {max(a, b)}"
    return Item(key, _phrase(rng, ADD, a=a, b=b), add_working(a, b))


def subtract(rng: Random) -> Item:
    """Two numbers below 100 whose difference is not negative."""
    b, a = sorted((_operand(rng), _operand(rng)))
    return Item(f"subtract {a} {b}", _phrase(rng, SUBTRACT, a=a, b=b), subtract_working(a, b))


def _random_word(rng: Random) -> str:
    """Random letters, few or many, random syllables, or a word from the lists."""
    kind = rng.random()
    if kind < 0.4:
        letters = rng.sample(string.ascii_lowercase, rng.choice((2, 3, 4, 26, 26, 26)))
        word = "".join(rng.choices(letters, k=rng.randint(3, 7)))
    elif kind < 0.65:
        word = "".join(rng.choice(words.SYLLABLES) for _ in range(rng.randint(2, 3)))[:8]
    elif kind < 0.95:
        word = rng.choice(words.COMMON)
    else:
        word = rng.choice(words.NAMES + words.CITIES + words.DAYS)
    return word.capitalize() if rng.random() < 0.05 else word


def reverse(rng: Random) -> Item:
    """A word written backwards."""
    word = _random_word(rng)
    return Item(f"reverse {word.lower()}", _phrase(rng, REVERSE, w=word), word[::-1])


def spell(rng: Random) -> Item:
    """A word letter by letter: `c a t`."""
    word = _random_word(rng)
    return Item(f"spell {word.lower()}", _phrase(rng, SPELL, w=word), " ".join(word))


def count(rng: Random) -> Item:
    """Counting up by one, at most ten numbers below 100."""
    start = rng.randint(0, 20) if rng.random() < 0.6 else rng.randint(0, 97)
    end = min(99, start + rng.randint(2, 9))
    answer = ", ".join(str(number) for number in range(start, end + 1))
    return Item(f"count {start} {end}", _phrase(rng, COUNT, a=start, b=end), answer)


def day_after(rng: Random) -> Item:
    """The next weekday; with seven days only, the key is the day in one phrasing."""
    day, template = rng.randrange(7), rng.randrange(len(DAY_AFTER))
    question = _phrase(rng, (DAY_AFTER[template],), d=words.DAYS[day])
    return Item(f"day {day} {template}", question, words.DAYS[(day + 1) % 7])


def echo(rng: Random) -> Item:
    """One to four words said back."""
    spoken = [
        _random_word(rng) if rng.random() < 0.3 else rng.choice(words.COMMON)
        for _ in range(rng.randint(1, 4))
    ]
    text = " ".join(spoken)
    text = text.capitalize() if rng.random() < 0.1 else text
    return Item(f"echo {text.lower()}", _phrase(rng, ECHO, t=text), text)


def _record(rng: Random) -> dict[str, str | int]:
    made_up = _random_word(rng).capitalize()
    record: dict[str, str | int] = {
        "name": made_up if rng.random() < 0.1 else rng.choice(words.NAMES),
        "age": rng.randint(1, 99),
        "city": rng.choice(words.CITIES),
    }
    if rng.random() < 0.6:
        return record
    record |= {
        "color": rng.choice(words.COLORS),
        "animal": rng.choice(words.ANIMALS),
        "food": rng.choice(words.FOODS),
        "job": rng.choice(words.JOBS),
        "score": rng.randint(0, 99),
    }
    return {field: record[field] for field in rng.sample(list(record), rng.randint(2, 4))}


def json_object(rng: Random) -> Item:
    """A record described as `name Ann, age 31, city Oslo`, as a JSON object."""
    record = _record(rng)
    described = ", ".join(f"{field} {value}" for field, value in record.items())
    return Item(f"json {described}", _phrase(rng, JSON, r=described), json.dumps(record))


def sort(rng: Random) -> Item:
    """Three numbers below 100 in increasing order; every order shares a key."""
    a, b, c = rng.sample(range(100), 3)
    if rng.random() < 0.3:
        a, b, c = (min(99, a // 10 * 10 + rng.randint(0, 9)) for _ in range(3))
    answer = ", ".join(str(number) for number in sorted((a, b, c)))
    return Item(f"sort {answer}", _phrase(rng, SORT, a=a, b=b, c=c), answer)


TASKS: dict[str, Callable[[Random], Item]] = {
    "add": add,
    "subtract": subtract,
    "reverse": reverse,
    "spell": spell,
    "count": count,
    "day_after": day_after,
    "echo": echo,
    "json": json_object,
    "sort": sort,
}


def split_of(key: str) -> Split:
    """One key in `HELD_OUT_ONE_IN` is held out, and so is everything in `ALWAYS_HELD_OUT`."""
    chosen = zlib.crc32(key.encode()) % HELD_OUT_ONE_IN == 0
    return Split.HELD_OUT if chosen or key in ALWAYS_HELD_OUT else Split.TRAIN


def draw(task: str, split: Split, rng: Random) -> Item:
    """A random item of `task` on the `split` side of the hash."""
    while split_of((item := TASKS[task](rng)).key) is not split:
        pass
    return item


def examples(task: str, split: Split, limit: int, seed: int) -> list[tuple[str, str]]:
    """Up to `limit` (question, answer) pairs with distinct questions; fewer where no more exist."""
    rng = Random(f"{seed} {task}")
    found: dict[str, str] = {}
    for _ in range(limit * 20):
        if len(found) == limit:
            break
        _, question, answer = draw(task, split, rng)
        found[question] = answer
    return list(found.items())
