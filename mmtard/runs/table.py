"""A table of the runs below a folder, from what each left there and, where it answers, from Slurm's queue."""

from __future__ import annotations

import fcntl
import json
import os
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .. import config as settings
from ..distributed import slurm
from ..errors import UserError
from . import history
from .layout import HISTORY

RECENT = 20  # steps whose mean speed is shown
TAIL_BYTES = 65536
QUEUED, RUNNING = (
    ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED"),
    ("RUNNING", "SIGNALING", "COMPLETING", "CONFIGURING"),
)
COLUMNS = ("run", "state", "step", "images/s", "left", "last checkpoint", "restarts", "robust accuracy")


@dataclass(frozen=True)
class Row:
    """What one run has to show; None where there is nothing yet."""

    run: Path
    state: str  # complete, running, queued, stopped, or failed: and why
    step: int = 0
    steps: int | None = None
    images_per_s: float | None = None
    seconds_left: float | None = None
    checkpoint: int | None = None
    checkpoint_age: float | None = None
    restarts: int = 0
    robust: str | None = None


def show(folder: Path) -> None:
    """Print the table. Raises UserError when there is no run below the folder."""
    rows = find_runs(folder)
    if not rows:
        raise UserError(f"no run below '{folder}'; give the folder that holds your run_dirs")
    table = Table()
    for i, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if 2 <= i <= 4 or i == 6 else "left", overflow="fold")
    for row in rows:
        table.add_row(*_cells(row, folder))
    console = Console(highlight=False)
    (console if console.is_terminal else Console(highlight=False, width=200)).print(table)


def find_runs(folder: Path) -> list[Row]:
    """A row for each run folder below (or at) `folder`, by name."""
    runs = []
    for path, below, files in os.walk(folder):
        if HISTORY in files:
            runs.append(Path(path))
            below.clear()
    jobs = {run: history.current_job(run, history.read(run)[-1]) for run in runs if history.read(run)}
    queue = slurm.states({job for job in jobs.values() if job})
    return [_row(run, queue.get(jobs[run])) for run in sorted(jobs)]


def _row(run: Path, in_slurm: str | None) -> Row:
    starts = history.read(run)
    common = {"restarts": len(starts) - 1, "robust": _robust(run)}
    latest = run / "checkpoints" / "latest"
    if latest.exists():
        common |= {"checkpoint": history.newest_step(run), "checkpoint_age": time.time() - latest.stat().st_mtime}
    try:
        config = settings.load(run / "config.yaml")
    except UserError as error:
        return Row(run, f"unreadable: {error}", **common)
    rows = _tail(run / "metrics.jsonl")
    step, steps = rows[-1]["step"] if rows else starts[-1]["step"], config.train.steps
    state = _state(run, starts, in_slurm, config)
    if rows:
        seconds = sum(row["seconds"] for row in rows[-RECENT:]) / len(rows[-RECENT:])
        common |= {"images_per_s": config.train.batch_size / seconds}
        if state == "running":
            common |= {"seconds_left": (steps - step) * seconds}
    return Row(run, state, step, steps, **common)


def _state(run: Path, starts: list[dict], in_slurm: str | None, config: settings.Config) -> str:
    if _in_use(run) or in_slurm in RUNNING:
        return "running"
    kind = history.end_kind(starts[-1])
    if kind == history.COMPLETE:
        return "complete"
    if in_slurm in QUEUED:
        return "queued"
    if kind == history.FAILED:
        return f"failed: {history.end_reason(starts[-1])}"
    refused = history.why_not_restart(run, config.resume)
    return f"failed: {refused}" if refused else f"stopped: {history.end_reason(starts[-1])}"


def _in_use(run: Path) -> bool:
    """Whether a start holds the run's lock, on whatever node."""
    try:
        with (run / ".lock").open("rb") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _tail(path: Path) -> list[dict]:
    """The last rows of a JSONL file, without reading all of it."""
    try:
        with path.open("rb") as file:
            cut = file.seek(0, os.SEEK_END) > TAIL_BYTES
            file.seek(-TAIL_BYTES if cut else 0, os.SEEK_END if cut else os.SEEK_SET)
            lines = file.read().decode("utf-8", "replace").splitlines()[cut:]
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            pass  # being written
    return rows


def _robust(run: Path) -> str | None:
    """`41.2 % under linf 2/255` of the newest evaluation: its mean, at the first of its radii."""
    for path in sorted((run / "evaluations").glob("*/results.json"), key=lambda p: p.stat().st_mtime, reverse=True):
        try:
            result = json.loads(path.read_text())
            eps, mean = next(iter(result["averages"]["all"]["eps"].items()))
            return f"{100 * mean['robust']:.1f} % under {result['settings']['norm']} {eps} ({path.parent.name})"
        except (OSError, ValueError, KeyError, TypeError, StopIteration):
            continue
    return None


def _cells(row: Row, folder: Path) -> list[str]:
    checkpoint = "" if row.checkpoint is None else f"step {row.checkpoint}, {_time(row.checkpoint_age)} ago"
    name = str(row.run.relative_to(folder)) if row.run != folder else row.run.name
    return [
        name,
        row.state,
        f"{row.step}/{row.steps or '?'}",
        f"{row.images_per_s:.4g}" if row.images_per_s else "",
        _time(row.seconds_left) if row.seconds_left is not None else "",
        checkpoint,
        str(row.restarts),
        row.robust or "",
    ]


def _time(seconds: float) -> str:
    return str(timedelta(seconds=max(0, round(seconds))))
