"""What a run reports: `metrics.jsonl` (every step), `events.jsonl`, `probes.jsonl`, console lines, and the trackers."""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..distributed.console import lasting, printable
from ..errors import UserError
from ..files import read_json_lines
from .journal import Journal, missing
from .layout import EVENTS, METRICS, PROBES
from .trackers import Tracker, curves

# The columns that differ between equal runs.
TIMINGS = ("seconds", "images_per_s", "tflops_a_rank", "mfu", "memory_gib", "reserved_gib")
NO_METRICS = "steps without metrics"  # an event
LONGEST_S = 10**9 * 3600  # that is shown as the time left
# What a console line leaves out of a row, beside the quantiles.
NOT_SHOWN = ("step", "batch", "skipped", "replaced", *(name for name in TIMINGS if name != "mfu"))


class StepNumbers(Protocol):
    """What the ranks agreed on about a step."""

    means: dict[str, float]  # the loss and its terms, over the global batch
    quantiles: dict[str, float]
    digest: int  # which samples of which epoch
    skipped: int  # steps since the run began that were not applied
    replaced: int  # samples since the run began that took another's place


class Update(Protocol):
    """What the optimizer did in a step."""

    grad_norm: float


class SilentLogger:
    """The twin of `MetricLogger` on every rank but the first: it takes all calls and does nothing."""

    failure: UserError | None = None  # a record that could not be written, for all ranks to end with

    def begin(self, cost: Callable[[float], dict]) -> None: ...

    def step(self, step: int, numbers: StepNumbers, update: Update, lr: float) -> None: ...

    def write_row(self, row: dict[str, float | int]) -> None: ...

    def event(self, step: int, kind: str, **details) -> None: ...

    def probe(self, row: dict) -> None: ...

    def print(self, text: str) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


class MetricLogger(SilentLogger):
    """The reports of one run, written by its first rank.

    Opening cuts its files back to the step the run goes on from, so that a step that was lost in an interruption and
    done again stands there once; steps before it whose rows a crash of the machine took are named. `trackers` open one
    each; one that fails is named and left out from then on. Raises UserError where a file cannot be opened. A row that
    cannot be written later, such as on a full disk, is kept as `failure`, and no row follows it: the ranks agree on the
    end.
    """

    failure: UserError | None = None

    def __init__(
        self,
        run: Path,
        start: int,
        steps: int,
        log_every: int,
        trackers: dict[str, Callable[[], Tracker]] | None = None,
    ):
        self.run, self.steps, self.log_every = run, steps, log_every
        self._stream = lasting(sys.stdout)
        self._console = Console(file=self._stream, highlight=False, soft_wrap=True)
        self._console_is_gone = False
        self._journals = {name: Journal(run / name, start, name != PROBES) for name in (METRICS, EVENTS, PROBES)}
        self._bar = self._open_bar(start) if self._console.is_terminal else None
        self._began, self._start = time.monotonic(), start
        self._step_began, self._cost = self._began, lambda seconds: {"seconds": seconds}
        self._trackers: dict[str, Tracker] = {}
        for name, journal in self._journals.items():
            if journal.damaged:
                self.event(start, "damaged lines left out", file=name, lines=journal.damaged)
        self._name_missing(start)
        for name, make in (trackers or {}).items():
            self._attempt(name, lambda: self._trackers.update({name: make()}))

    def begin(self, cost: Callable[[float], dict]) -> None:
        """The first step begins now. `cost(seconds)` gives the columns of a step's speed and memory."""
        self._step_began, self._cost = time.monotonic(), cost

    def step(self, step: int, numbers: StepNumbers, update: Update, lr: float) -> None:
        """Record a finished step: `step` updates are done. Its time counts from the step before, or from `begin`."""
        now = time.monotonic()
        seconds, self._step_began = now - self._step_began, now
        row = {"step": step, **numbers.means, **numbers.quantiles, "lr": lr, "grad_norm": update.grad_norm}
        row |= {"batch": int(numbers.digest), "skipped": numbers.skipped, "replaced": numbers.replaced}
        self.write_row(row | self._cost(seconds))

    def write_row(self, row: dict[str, float | int]) -> None:
        """Write a row of numbers; those that are not finite are stored as null."""
        self._append(METRICS, row)
        self._track(lambda tracker: tracker.log(row["step"], curves(row)))
        if self._bar is not None:
            self._bar.update(self._task, completed=row["step"])
        if row["step"] % self.log_every == 0 or row["step"] == self.steps:
            self.print(self._summary(row))

    def event(self, step: int, kind: str, **details) -> None:
        """Record and print something out of the ordinary."""
        self._append(EVENTS, {"step": step, "event": kind, **details})
        shown = "  ".join(f"{k} {_short(v)}" for k, v in details.items())
        self.print(f"step {step}: {kind}  {shown}")

    def probe(self, row: dict) -> None:
        """Record a probe of the checkpoint of `row["step"]`.

        Its columns are the clean and the robust accuracy, the latter's interval95, n samples, and its protocol.
        """
        self._append(PROBES, row)
        accuracies = {f"accuracy/{kind}": row[kind] for kind in ("clean", "robust")}
        self._track(lambda tracker: tracker.log_probe(row["step"], accuracies))
        clean, robust, low, high = (100 * x for x in (row["clean"], row["robust"], *row["interval95"]))
        against = f"{row['protocol']['norm']} {row['protocol']['eps']}"
        self.print(
            f"probe of step {row['step']}: clean {clean:.1f} %, robust {robust:.1f} % ({low:.1f}-{high:.1f}) "
            f"against {against}, {row['n']} samples"
        )

    def print(self, text: str) -> None:
        """Print a line. A console that was closed is noted once, as an event, and the run goes on without it."""
        self._console.print(printable(text), markup=False)
        if self._stream.closed_by_reader and not self._console_is_gone:
            self._console_is_gone = True
            self.event(self._start, "the console was closed", remedy="mmtard runs shows how the run goes on")

    def sync(self) -> None:
        """Bring every record to the disk, as a checkpoint must find it that is gone on from. Any thread may ask."""
        for journal in self._journals.values():
            journal.sync()

    def close(self) -> None:
        """Every record is on disk, every tracker told that this start is over, the terminal as it was."""
        for journal in self._journals.values():
            journal.close()
        self._track(lambda tracker: tracker.close())
        if self._bar is not None:
            self._bar.stop()

    def _append(self, name: str, row: dict) -> None:
        if self.failure is None:
            try:
                self._journals[name].append(_storable(row))
            except UserError as error:
                self.failure = error

    def _name_missing(self, start: int) -> None:
        gaps = missing(self._journals[METRICS].steps, start)
        steps = [f"{first}" if first == last else f"{first} to {last}" for first, last in gaps]
        if not steps:
            return
        told = [row.get("steps") for row in read_json_lines(self.run / EVENTS) if row.get("event") == NO_METRICS]
        if steps not in told:
            self.event(start, NO_METRICS, steps=steps)

    def _open_bar(self, start: int) -> Progress:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(),
        )
        bar = Progress(*columns, console=self._console)
        self._task = bar.add_task(printable(self.run.name), total=self.steps, completed=start)
        bar.start()
        return bar

    def _track(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            if not self._attempt(name, lambda: call(tracker)):
                del self._trackers[name]

    def _attempt(self, name: str, call: Callable[[], None]) -> bool:
        try:
            call()
        except Exception as error:  # of a service or a library: whatever it is, training is worth more
            reason = " ".join(str(error).split())[:300]
            self.print(f"{name} gets no more numbers of this start: {type(error).__name__}: {reason}")
            return False
        return True

    def _summary(self, row: dict) -> str:
        done, width = row["step"], len(str(self.steps))
        seconds = (time.monotonic() - self._began) / max(1, done - self._start) * (self.steps - done)
        shown = {k: v for k, v in row.items() if k not in NOT_SHOWN and not re.search(r"_p\d\d$", k)}
        numbers = "  ".join(f"{k} {v:.4g}" for k, v in shown.items())
        speed = f"{row['images_per_s']:.4g} images/s  left {timedelta(seconds=round(min(seconds, LONGEST_S)))}"
        return f"step {done:{width}d}/{self.steps}  {numbers}  {speed}"


def _storable(row: dict) -> dict:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def _short(value) -> str:
    if isinstance(value, list) and len(value) > 4:
        return f"{', '.join(map(str, value[:4]))}, ... ({len(value)})"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
