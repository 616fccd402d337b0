"""What becomes of a rank when another is lost or hangs: it ends in time, names the rank, and notes why in the run."""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

from ..config import Config
from ..distributed.console import say
from ..distributed.devices import gpu_fault
from ..distributed.interruption import EXIT_REQUEUE
from ..distributed.ranks import Ranks, peer_is_gone
from ..errors import ProcessLostError, RunError, UserError
from ..runs import history
from ..runs.layout import HISTORY
from .heartbeat import PHASES, Heartbeat, in_words, is_gone, order

WORD_S = 3.0  # how long a rank that lost its connection waits for what the others met
# A heartbeat that stands still for so long is a lost rank. Network file systems may show a file for a minute as it was.
SILENT_S = 90.0


def group_timeout(config: Config) -> timedelta:
    """How long process groups wait: longer than the watchdog, which then always speaks first."""
    return max(timedelta(minutes=30), timedelta(minutes=1.5 * config.resume.watchdog_minutes + 5))


class Watchdog:
    """Guards one rank of a run. Use as a context manager around the run; `at` tells where the rank is.

    A thread refreshes the rank's heartbeat, since a rank that hangs in a collective runs nothing else, and ends the
    process in three cases. The next rank, around the ring, is silent or its process is gone. Another rank noted in the
    history how this start ended. A phase of a step takes longer than `resume.watchdog_minutes`; then the thread says
    what another rank met, or names the ranks that are silent or behind, and prints the stacks. A lost connection, or a
    GPU that fails, leaves as a RunError of one line. All exit with EXIT_REQUEUE when the run may be started again.
    """

    def __init__(self, config: Config, ranks: Ranks):
        self.run, self.rank, self.bounds = Path(config.run_dir), ranks.rank, config.resume
        self.limit = 60 * config.resume.watchdog_minutes
        self.interval = min(5.0, self.limit / 20)
        self.silent = SILENT_S
        self.heartbeat = Heartbeat(self.run, ranks.rank, ranks.world_size)
        self._since = time.monotonic()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        return self

    def at(self, step: int, phase: str) -> None:
        """This rank begins a phase of a step. The first call follows the note of the start and begins the watch."""
        self.heartbeat.place, self._since = (step, phase), time.monotonic()
        if phase != PHASES[0]:  # for the case that the thread, too, can run no more
            faulthandler.dump_traceback_later(self.limit * 1.2 + 10, exit=True)
        if self._thread is None:
            self.heartbeat.write()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def __exit__(self, kind, error, traceback) -> bool:
        faulthandler.cancel_dump_traceback_later()
        self._closed.set()
        if self._thread is not None:
            self._thread.join(WORD_S)  # a file system that hangs may hold it
        if error is None:
            self.heartbeat.left = True
            if self._thread is not None:
                self.heartbeat.write()
            return False
        if isinstance(error, KeyboardInterrupt):
            self._end(history.STOPPED, "SIGINT twice")
        elif isinstance(error, ProcessLostError):
            raise RunError(*self._end(history.LOST, f"rank {self.rank}, step {self._step}: {error}")) from None
        elif isinstance(error, (UserError, RunError)):
            self._end(history.FAILED, str(error))
        elif (fault := gpu_fault(error)) is not None:
            reason = f"rank {self.rank}, step {self._step}: a GPU of {socket.gethostname()} failed: {fault}"
            raise RunError(*self._end(history.LOST, reason)) from None
        elif peer_is_gone(error):
            raise RunError(*self._end(*self._why_the_connection_was_lost(error))) from None
        else:
            self._end(history.FAILED, f"rank {self.rank}: {kind.__name__}: {_one_line(error)}")
        return False

    @property
    def _step(self) -> int:
        return self.heartbeat.place[0]

    # ---------------------------------------------------------------- the end

    def _end(self, kind: str, reason: str) -> tuple[str, int]:
        """Note the end where the others and the next start find it: (what to tell, exit status)."""
        if self._thread is None:
            return reason, 1  # before the note of this start, there is none to note its end in
        self.heartbeat.said = (kind, reason)
        self.heartbeat.write()
        try:
            history.record_end(self.run, kind, reason, self._step)
            refused = history.why_not_restart(self.run, self.bounds) or history.why_not_restart_job(self.run)
        except (OSError, UserError):
            refused = None  # the next start counts it as lost
        if kind != history.LOST:
            return reason, 1
        if refused:
            return refused, 1
        return f"{reason}; start it again to go on from the last checkpoint", EXIT_REQUEUE

    def _why_the_connection_was_lost(self, error: BaseException) -> tuple[str, str]:
        """(kind of end, reason): what another rank says it met, or else who says nothing."""
        self.heartbeat.said = (history.LOST, None)
        self.heartbeat.write()
        until = time.monotonic() + WORD_S
        while True:
            others = self.heartbeat.others()
            if met := _met(others):
                return met
            missing = [report for report in others.values() if not report["said"]]
            if not missing or time.monotonic() > until:
                break
            time.sleep(0.1)
        if missing:
            return history.LOST, f"step {self._step}: lost {in_words(missing)}"
        return history.LOST, f"step {self._step}: lost the connection to the other ranks: {_one_line(error)}"

    # ---------------------------------------------------------------- the watch

    def _watch(self) -> None:
        neighbour = _Neighbour(self.heartbeat, self.silent)
        noted = _mark(self.run / HISTORY)
        while not self._closed.wait(self.interval):
            self.heartbeat.write()
            since = self._since
            if reason := neighbour.why_lost():
                self._end_process(history.LOST, f"step {self._step}: lost {reason}", since)
            elif (mark := _mark(self.run / HISTORY)) != noted:
                if ended := self._noted_end():
                    self._end_process(*ended, since)
                else:
                    noted = mark  # a note that ends nothing is read once
            # Whom to name takes two looks, so the watch starts to look a little early.
            early = min(self.silent, max(self.limit / 4, 3 * self.interval))
            if self.heartbeat.place[1] != PHASES[0] and time.monotonic() - self._since > self.limit - early:
                self._look()

    def _end_process(self, kind: str, reason: str, since: float) -> None:
        """End this process, unless its main thread gets on: it may have seen the loss itself, or be past it."""
        if self._closed.wait(max(WORD_S, self.interval) if self.limit > WORD_S else self.interval):
            return
        if self._since == since:
            self._exit(kind, reason)

    def _noted_end(self) -> tuple[str, str] | None:
        """How another rank noted that this start ended badly; None while none did."""
        try:
            newest = history.read(self.run)[-1]
        except (OSError, UserError, IndexError):
            return None
        ended = newest.get("end") and history.end_kind(newest) in (history.LOST, history.FAILED)
        return (history.end_kind(newest), history.end_reason(newest)) if ended else None

    def _look(self) -> None:
        since, before = self._since, self.heartbeat.others()
        while time.monotonic() - since < self.limit:
            if self._closed.wait(self.interval) or self._since != since:
                return
            self.heartbeat.write()
        others = self.heartbeat.others()
        self._exit(*(_met(others) or (history.LOST, self._who_is_late(before, others))))

    def _exit(self, kind: str, reason: str) -> None:
        message, status = self._end(kind, reason)
        faulthandler.dump_traceback(sys.stderr)
        say(f"mmtard (rank {self.rank}): {message}", sys.stderr)
        os._exit(status)

    def _who_is_late(self, before: dict[int, dict], others: dict[int, dict]) -> str:
        """Whom this rank waits for, from two looks at the others."""
        still = [report for r, report in others.items() if report["beat"] == before.get(r, report)["beat"]]
        late = [report for report in still if not report["said"]]
        if not late:  # all are alive: those in an earlier phase than the others are waited for
            everyone = [*others.values(), self.heartbeat.report()]
            first = min(map(order, everyone))
            behind = [report for report in everyone if order(report) == first]
            late = behind if first < max(map(order, everyone)) else []
        step, phase = self.heartbeat.place
        reason = f"step {step}: no progress in its {phase} for {self.limit / 60:.3g} minutes, "
        return reason + (f"{in_words(late)} did not arrive" if late else "no rank is behind the others")


class _Neighbour:
    """What the next rank's reports, one after another, say of its life."""

    def __init__(self, heartbeat: Heartbeat, silent: float):
        self.heartbeat, self.silent = heartbeat, silent
        self._beat, self._changed, self._was_gone = None, time.monotonic(), False

    def why_lost(self) -> str | None:
        """The rank in words when its process is gone, or its beat has stood still for too long; None while it lives."""
        if self.heartbeat.world_size == 1:
            return None
        report, now = self.heartbeat.neighbour(), time.monotonic()
        if report["beat"] != self._beat:
            self._beat, self._changed, self._was_gone = report["beat"], now, False
        if report["left"] or report["said"] or report["host"] == "?":
            return None
        # One that ended by itself says so at about the same time, so it takes two looks to call it gone.
        was_gone, self._was_gone = self._was_gone, is_gone(report)
        if was_gone and self._was_gone:
            return f"{in_words([report])}: its process is gone"
        if now - self._changed > self.silent:
            return f"{in_words([report])}: silent for {now - self._changed:.0f} seconds"
        return None


def _mark(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _met(others: dict[int, dict]) -> tuple[str, str] | None:
    """(kind of end, reason) of the others that say what they met; None while nobody does.

    A failure rather than the loss that it led to.
    """
    said = [tuple(report["said"]) for report in others.values() if report["said"] and report["said"][1]]
    return min(said, key=lambda end: end[0] not in history.FOR_GOOD, default=None)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
