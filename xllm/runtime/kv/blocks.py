"""The pool of KV pages: who holds which is counted, so that a later prefix cache may share them."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence


class PoolError(RuntimeError):
    """Pages were given out or taken back wrongly: a bug of the caller."""


class BlockPool:
    """Pages 1 to ``num_pages`` - 1 of ``page_size`` tokens; page 0 is padding's scratch."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 2 or page_size < 1:
            raise PoolError(
                f"a KV pool of {num_pages} pages of {page_size} tokens holds nothing; "
                "needed: at least 2 pages, the first being scratch, of at least 1 token"
            )
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = deque(range(1, num_pages))
        self._holders = [0] * num_pages

    @property
    def usable_pages(self) -> int:
        """Pages that requests may hold, in use or not."""
        return self.num_pages - 1

    @property
    def free_pages(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold ``tokens`` tokens."""
        return -(-tokens // self.page_size)

    def grow(self, table: list[int], tokens: int) -> bool:
        """Extend ``table`` to hold ``tokens`` tokens; False, and no change, if pages are short."""
        missing = self.pages_for(tokens) - len(table)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            page = self._free.popleft()
            self._holders[page] += 1
            table.append(page)
        return True

    def release(self, table: list[int]) -> None:
        """Give back every page of ``table`` and empty it; raises :class:`PoolError`."""
        for page in reversed(table):
            if self._holders[page] < 1:
                raise PoolError(f"page {page} is released but nobody holds it")
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)
        table.clear()

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise :class:`PoolError` unless ``tables`` are all that is held, and nothing is lost."""
        held = Counter(page for table in tables for page in table)
        for page in range(self.num_pages):
            if self._holders[page] != held[page]:
                raise PoolError(
                    f"page {page} counts {self._holders[page]} holders, {held[page]} found"
                )
        free = sorted(self._free)
        expected = [page for page in range(1, self.num_pages) if not held[page]]
        if free != expected or held[0]:
            raise PoolError(f"free pages are {free}, expected {expected}; page 0 held {held[0]}x")
