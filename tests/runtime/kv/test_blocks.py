"""BlockPool: pages are given out once, come back once, and losses are noticed."""

from __future__ import annotations

import pytest

from xllm.runtime.kv.blocks import BlockPool, PoolError


def test_grow_takes_only_what_is_missing() -> None:
    pool, table = BlockPool(6, 4), []
    assert pool.usable_pages == pool.free_pages == 5
    assert pool.grow(table, 5) and len(table) == 2
    assert pool.grow(table, 8) and len(table) == 2
    assert pool.grow(table, 1) and len(table) == 2
    assert pool.grow(table, 9) and len(table) == 3 and 0 not in table
    pool.check_integrity([table])


def test_growing_is_all_or_nothing() -> None:
    pool, first, second = BlockPool(4, 2), [], []
    assert pool.grow(first, 3)
    assert not pool.grow(second, 3) and second == [] and pool.free_pages == 1
    pool.release(first)
    assert first == [] and pool.grow(second, 6) and pool.free_pages == 0
    pool.check_integrity([second])


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_pages_for(tokens: int, pages: int) -> None:
    assert BlockPool(2, 16).pages_for(tokens) == pages


def test_misuse_is_noticed() -> None:
    pool, table = BlockPool(4, 2), []
    pool.grow(table, 4)
    with pytest.raises(PoolError, match="1 holders, 0 found"):
        pool.check_integrity([])
    with pytest.raises(PoolError, match="1 holders, 2 found"):
        pool.check_integrity([table, table])
    copy = list(table)
    pool.release(table)
    with pytest.raises(PoolError, match="nobody holds it"):
        pool.release(copy)
    with pytest.raises(PoolError, match="holds nothing"):
        BlockPool(1, 16)


def test_a_lost_page_is_noticed() -> None:
    pool = BlockPool(4, 2)
    pool._free.popleft()
    with pytest.raises(PoolError, match="free pages"):
        pool.check_integrity([])
