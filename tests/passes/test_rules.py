"""Every rule of every pass: hit, miss, second user, chain, mutation, ``when``, type, values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.passes.rule_checks import CHECKS, check_hit, check_values
from tests.passes.rule_table import TABLE, Entry, rules

CASES = [(name, dtype) for name, entry in TABLE.items() for dtype in entry.dtypes]
IDS = [f"{name}-{str(dtype).removeprefix('torch.')}" for name, dtype in CASES]
BY_RULE = pytest.mark.parametrize(("name", "dtype"), CASES, ids=IDS)


def test_every_rule_has_an_entry() -> None:
    assert set(rules()) == set(TABLE), "add the rule to tests/passes/rule_table.py"


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_structure(name: str, check: Callable[[Entry, torch.dtype], None]) -> None:
    check(TABLE[name], TABLE[name].dtypes[-1])


@BY_RULE
def test_fires_in_each_dtype(name: str, dtype: torch.dtype) -> None:
    check_hit(TABLE[name], dtype)


@BY_RULE
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_values(name: str, dtype: torch.dtype, seed: int) -> None:
    check_values(TABLE[name], dtype, seed)
