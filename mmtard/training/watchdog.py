"""What becomes of a rank when another is lost or hangs: it ends in time, names the rank, and notes the reason in the run's folder."""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

from ..config import Config
from ..distributed.interruption import EXIT_REQUEUE
from ..distributed.ranks import Ranks, peer_is_gone
from ..errors import ProcessLostError, RunError, UserError
from ..runs import history
from ..runs.layout import HEARTBEATS

PHASES = ("set-up", "data", "update", "agreement", "checkpoint")  # of a step, in their order
WORD_S = 3.0  # how long a rank that lost its connection waits for what the others met


class Watchdog:
    """Guards one rank of a run. Use as a context manager around the run; `at` tells where the rank is.

    Each rank keeps its place in RUN/.heartbeat/rank-N.json, refreshed by a thread, since a rank that hangs in a collective runs
    nothing else. When a phase of a step takes longer than `resume.watchdog_minutes`, the thread says what another rank met, or names the
    ranks that are silent or behind, prints the stacks, and ends the process. A lost connection leaves as a RunError of one line. Both
    exit with `preempt.REQUEUE` when the run may be started again.
    """

    def __init__(self, config: Config, ranks: Ranks):
        self.run, self.rank, self.world, self.bounds = Path(config.run_dir), ranks.rank, ranks.world_size, config.resume
        self.limit = 60 * config.resume.watchdog_minutes
        self.interval = min(5.0, self.limit / 20)
        self._place, self._since = (0, PHASES[0]), time.monotonic()
        self._beat, self._said = 0, None
        self._writing, self._closed = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        return self

    def at(self, step: int, phase: str) -> None:
        """This rank begins a phase of a step. The first call follows the note of the start and begins the watch."""
        self._place, self._since = (step, phase), time.monotonic()
        if phase != PHASES[0]:  # for the case that the thread, too, can run no more
            faulthandler.dump_traceback_later(self.limit * 1.2 + 10, exit=True)
        if self._thread is None:
            (self.run / HEARTBEATS).mkdir(exist_ok=True)
            self._write()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def __exit__(self, kind, error, traceback) -> bool:
        faulthandler.cancel_dump_traceback_later()
        self._closed.set()
        if self._thread is not None:
            self._thread.join(WORD_S)  # a file system that hangs may hold it
        if error is None:
            return False
        if peer_is_gone(error):
            how, why = self._what_the_others_met()
            if why is None:
                why = f"step {self._place[0]}: lost the connection to the other ranks: {' '.join(str(error).split())[:300]}"
            raise RunError(*self._end(how, why)) from None
        if isinstance(error, ProcessLostError):
            raise RunError(*self._end(history.LOST, f"rank {self.rank}, step {self._place[0]}: {error}")) from None
        if isinstance(error, (UserError, RunError)):
            self._end(history.FAILED, str(error))
        elif isinstance(error, KeyboardInterrupt):
            self._end(history.STOPPED, "SIGINT twice")
        else:
            self._end(history.FAILED, f"rank {self.rank}: {kind.__name__}: {' '.join(str(error).split())[:300]}")
        return False

    # ---------------------------------------------------------------- the end

    def _end(self, how: str, why: str) -> tuple[str, int]:
        """Note the end where the others and the next start find it: (what to tell, exit status)."""
        if self._thread is None:
            return why, 1  # before the note of this start, there is none to note its end in
        self._said = (how, why)
        self._write()
        try:
            history.record_end(self.run, how, why, self._place[0])
            refused = history.why_not_restart(self.run, self.bounds) or history.why_not_restart_job(self.run)
        except (OSError, UserError):
            refused = None  # the next start counts it as lost
        if how != history.LOST:
            return why, 1
        return (refused, 1) if refused else (f"{why}; start it again to go on from the last checkpoint", EXIT_REQUEUE)

    def _what_the_others_met(self) -> tuple[str, str | None]:
        """(kind of end, why) after a lost connection: what another rank says it met, or else who says nothing."""
        self._said = (history.LOST, None)
        self._write()
        until = time.monotonic() + WORD_S
        while True:
            others = self._others()
            if met := _met(others):
                return met
            missing = [rank for rank in others.values() if not rank["said"]]
            if not missing or time.monotonic() > until:
                break
            time.sleep(0.1)
        return history.LOST, f"step {self._place[0]}: lost {_names(missing)}" if missing else None

    # ---------------------------------------------------------------- the watch

    def _watch(self) -> None:
        while not self._closed.wait(self.interval):
            self._write()
            # Whom to name takes two looks, so the watch starts to look a little early.
            if self._place[1] != PHASES[0] and time.monotonic() - self._since > self.limit - 3 * self.interval:
                self._look()

    def _look(self) -> None:
        since, before = self._since, self._others()
        while time.monotonic() - since < self.limit:
            if self._closed.wait(self.interval) or self._since != since:
                return
            self._write()
        others = self._others()
        how, why = _met(others) or (history.LOST, self._who_is_late(before, others))
        told, status = self._end(how, why)
        faulthandler.dump_traceback(sys.stderr)
        print(f"mmtard (rank {self.rank}): {told}", file=sys.stderr, flush=True)
        os._exit(status)

    def _who_is_late(self, before: dict[int, dict], others: dict[int, dict]) -> str:
        """Whom this rank waits for, from two looks at the others."""
        late = [rank for r, rank in others.items() if rank["beat"] == before.get(r, rank)["beat"] and not rank["said"]]
        if not late:  # all are alive: those in an earlier phase than the others are waited for
            everyone = [*others.values(), self._report()]
            first = min(map(_order, everyone))
            late = [rank for rank in everyone if _order(rank) == first] if first < max(map(_order, everyone)) else []
        step, phase = self._place
        why = f"step {step}: no progress in its {phase} for {self.limit / 60:.3g} minutes, "
        return why + (f"{_names(late)} did not arrive" if late else "no rank is behind the others")

    # ---------------------------------------------------------------- heartbeats

    def _report(self) -> dict:
        step, phase = self._place
        own = {"rank": self.rank, "host": socket.gethostname(), "pid": os.getpid()}
        return own | {"step": step, "phase": phase, "beat": self._beat, "said": self._said}

    def _write(self) -> None:
        with self._writing:
            self._beat += 1
            path = self.run / HEARTBEATS / f"rank-{self.rank}.json"
            try:
                path.with_suffix(".tmp").write_text(json.dumps(self._report()))
                path.with_suffix(".tmp").replace(path)
            except OSError:
                pass  # a full or absent file system is the checkpoint's to report

    def _others(self) -> dict[int, dict]:
        """Rank -> its last report; empty for one that never came so far."""
        found = {}
        for rank in set(range(self.world)) - {self.rank}:
            found[rank] = {
                "rank": rank,
                "host": "?",
                "pid": "?",
                "step": 0,
                "phase": PHASES[0],
                "beat": 0,
                "said": None,
            }
            try:
                found[rank] |= json.loads((self.run / HEARTBEATS / f"rank-{rank}.json").read_text())
            except (OSError, ValueError):
                pass
        return found


def _met(others: dict[int, dict]) -> tuple[str, str] | None:
    """(kind of end, why) of the others that say what they met, a failure rather than the loss it led to; None while nobody does."""
    told = [tuple(rank["said"]) for rank in others.values() if rank["said"] and rank["said"][1]]
    return min(told, key=lambda said: said[0] not in history.FOR_GOOD, default=None)


def _order(report: dict) -> tuple[int, int]:
    return report["step"], PHASES.index(report["phase"])


def _names(ranks: list[dict]) -> str:
    told = [
        f"rank {r['rank']} ({r['host']}, process {r['pid']}, last heard of in the {r['phase']} of step {r['step']})"
        for r in ranks[:4]
    ]
    return ", ".join(told) + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")
