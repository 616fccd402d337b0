"""What a long command does now, and how long it may still take: a line on stderr, where that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

MEMORY_S = 3600.0  # of the speed that the time left is told by: a single step may take a minute


class WorkProgress:
    """A bar of one part of the work after another; shown where that is asked for, on a terminal alone.

    It is drawn once a second, which costs about a millisecond of a process that is being measured.
    """

    def __init__(self, shown: bool = True):
        console = Console(stderr=True, highlight=False)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(20),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(
            *columns,
            console=console,
            refresh_per_second=1,
            speed_estimate_period=MEMORY_S,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # what goes to a file stays there
            disable=not (shown and console.is_terminal),
        )
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> WorkProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def part(self, words: str, total: float | None = None, done: float = 0.0) -> None:
        """Begin a part of the work. total: of what `advance` counts; None: nobody knows how long it takes."""
        self._bar.remove_task(self._task)
        self._task = self._bar.add_task(words, total=total, completed=done)
        self.advance(0.0)  # the time left is told from here on
        self._bar.refresh()

    def say(self, words: str) -> None:
        """Say what is done now."""
        self._bar.update(self._task, description=words, refresh=True)

    def advance(self, amount: float = 1.0) -> None:
        """So much more of the part's total is done."""
        self._bar.advance(self._task, amount)

    @contextmanager
    def running(self, words: str, amount: float = 1.0) -> Iterator[None]:
        """Say what is done in the block, and count `amount` when it is done."""
        self.say(words)
        yield
        self.advance(amount)

    @contextmanager
    def running_at_most(self, words: str, most: float) -> Iterator[Callable[[float], None]]:
        """As `running`, for work of at most `most`: what is given counts it while it is done."""
        self.say(words)
        done = 0.0

        def advance(amount: float) -> None:
            nonlocal done
            amount = min(amount, most - done)
            done += amount
            self.advance(amount)

        yield advance
        advance(most)
