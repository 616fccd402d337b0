"""Signals become a flag that the loops read: nothing is saved or torn down inside a handler."""

from __future__ import annotations

import signal
from collections.abc import Callable

from ..errors import RunError

EXIT_REQUEUE = 75  # exit status of a run that saved its state and wants to be started again (EX_TEMPFAIL)
EXIT_INTERRUPTED = 130  # of what a person stopped (SIGINT: 128 + 2), which no job starts again by itself


class StoppedWithin(Exception):
    """Work was left in the middle because this process was interrupted; nothing of it is kept."""


class Interruption:
    """Remembers the first signal that asks for an end; a second SIGINT interrupts at once.

    These are SIGTERM, SIGUSR2 (Slurm's and submitit's warning), SIGINT, and SIGHUP of a terminal that is closed, unless
    the process was started to ignore it (nohup). Use as a context manager around the loops; afterwards the signals are
    ignored, since a late one must not turn a finished run into a failed one.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)

    def __init__(self):
        self.signal: str | None = None

    def __enter__(self) -> Interruption:
        for number in self.heeded():
            signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number in self.SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def __bool__(self) -> bool:
        return self.signal is not None

    @classmethod
    def heeded(cls) -> list[signal.Signals]:
        """The signals that mean something to this process: all but SIGHUP under nohup, which ignores it."""
        under_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        return [number for number in cls.SIGNALS if not (number == signal.SIGHUP and under_nohup)]

    @property
    def name(self) -> str:
        """The signal in words."""
        return self.signal or "a signal to another rank"

    def stop(self, ranks, kept: str = "nothing was written") -> None:
        """Raise RunError on every rank when any of them was interrupted; it says what is kept. Collective.

        Its status is `exit_status`.
        """
        if ranks.any(bool(self)):
            raise RunError(f"stopped by {self.name}; {kept}, start it again", self.exit_status(ranks))

    def exit_status(self, ranks) -> int:
        """EXIT_INTERRUPTED where SIGINT reached any rank, else EXIT_REQUEUE. Collective."""
        by_a_person = ranks.any(self.signal == signal.SIGINT.name)
        return EXIT_INTERRUPTED if by_a_person else EXIT_REQUEUE

    def heeding(self, function: Callable) -> Callable:
        """`function` that raises StoppedWithin in place of its next call once this process was interrupted.

        For what is called often within hours of work, such as a model that is attacked.
        """

        def call(*args):
            if self:
                raise StoppedWithin
            return function(*args)

        return call

    def _note(self, number, frame) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or signal.Signals(number).name
