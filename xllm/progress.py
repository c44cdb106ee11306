"""Progress of long work: what is being done, how far it is, how long it took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Reporter:
    """Shows phases on standard error; on a terminal as bars, elsewhere one line per phase."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        self.seconds: dict[str, float] = {}

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Phase]:
        """A phase of ``total`` steps (None: unknown); its time is kept in :attr:`seconds`."""
        columns = (SpinnerColumn(), TextColumn("{task.description:<24}"), BarColumn(24),
                   TextColumn("{task.fields[what]}"), TimeElapsedColumn())
        start = time.perf_counter()
        hidden = not self.console.is_terminal
        with Progress(*columns, console=self.console, transient=True, disable=hidden) as bars:
            yield Phase(bars, bars.add_task(name, total=total, what=""))
        spent = time.perf_counter() - start
        self.seconds[name] = self.seconds.get(name, 0.0) + spent
        self.say(f"{name:<24} {spent:7.1f} s")


class Phase:
    """A phase under way."""

    def __init__(self, bars: Progress, task: int) -> None:
        self._bars, self._task = bars, task

    def step(self, what: str = "") -> None:
        """The next step begins: ``what`` is being done."""
        self._bars.update(self._task, advance=1, what=what)
