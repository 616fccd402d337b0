"""What each run below a folder left there, and where it answers, what Slurm's queue says of it."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

from .. import config as settings
from ..distributed import slurm
from ..errors import UserError
from ..files import json_objects, opened, refuse_special
from . import history, lock
from .layout import CHECKPOINTS, CONFIG, EVALUATIONS, HISTORY, METRICS, RESULTS, UNNOTED

RECENT = 20  # steps whose mean speed is shown
TAIL_BYTES = 65536
QUEUED = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED")
RUNNING = ("RUNNING", "SIGNALING", "COMPLETING", "CONFIGURING")


@dataclass(frozen=True)
class Row:
    """What one run has to show; None where there is nothing yet."""

    run: Path
    state: str  # complete, running, queued, stopped, failed or unreadable: and why
    step: int = 0
    steps: int | None = None
    images_per_s: float | None = None
    seconds_left: float | None = None
    checkpoint: int | None = None
    checkpoint_age: float | None = None  # seconds
    restarts: int = 0
    robust: str | None = None
    damaged: tuple[str, ...] = ()  # files that could not be read, in words


def find_runs(folder: Path) -> list[Row]:
    """A row for each run folder below (or at) `folder`, by name.

    A run, or a folder, that cannot be read is a row that says why.
    """
    runs: list[Path] = []
    unreadable: list[Row] = []

    def note(error: OSError) -> None:
        unreadable.append(Row(Path(error.filename), f"unreadable: {error.strerror}"))

    for path, below, files in os.walk(folder, onerror=note):
        if HISTORY in files or UNNOTED in files or (CONFIG in files and CHECKPOINTS in below):
            runs.append(Path(path))
            below.clear()
    jobs = {run: _job(run) for run in runs}
    queue = slurm.states({job for job in jobs.values() if job})
    rows = [_row(run, queue.get(jobs[run])) for run in runs]
    return sorted([*rows, *unreadable], key=lambda row: row.run)


def _job(run: Path) -> str | None:
    try:
        refuse_special(run)
        starts = history.read(run) + history.starts_before_noted(run)
        job = history.current_job(run, starts[-1]) if starts else None
    except (UserError, OSError):
        return None
    return job if isinstance(job, str) else None


def _row(run: Path, in_slurm: str | None) -> Row:
    try:
        refuse_special(run)
        return _read_row(run, in_slurm)
    except (UserError, OSError) as error:
        return Row(run, f"unreadable: {error}")
    except Exception as error:
        return Row(run, f"unreadable: {type(error).__name__}: {error}")


def _read_row(run: Path, in_slurm: str | None) -> Row:
    starts = history.read(run)
    if not starts:
        return Row(run, _state_without_start(run, in_slurm))
    robust, damaged = _robust(run)
    known = {"restarts": len(starts) - 1, "robust": robust, "damaged": damaged}
    if step := history.newest_step(run):
        saved = (run / CHECKPOINTS / f"step-{step}").stat().st_mtime
        known |= {"checkpoint": step, "checkpoint_age": time.time() - saved}
    try:
        config = settings.load(run / CONFIG)
    except UserError as error:
        return Row(run, f"unreadable: {error}", **known)
    rows = _tail(run / METRICS)
    # Metrics may be gone or damaged; a saved step was done all the same.
    step, steps = rows[-1]["step"] if rows else max(starts[-1]["step"], known.get("checkpoint", 0)), config.train.steps
    state = _state(run, starts, in_slurm, config)
    if rows:
        seconds = sum(row["seconds"] for row in rows[-RECENT:]) / len(rows[-RECENT:])
        if 0 < seconds < math.inf:
            known |= {"images_per_s": config.train.batch_size / seconds}
        if state == "running" and seconds < math.inf:
            known |= {"seconds_left": (steps - step) * seconds}
    return Row(run, state, step, steps, **known)


def _state_without_start(run: Path, in_slurm: str | None) -> str:
    unnoted = history.end_before_noted(run)
    if not (run / HISTORY).exists() and not unnoted:
        return f"unreadable: {HISTORY} is gone"
    if lock.is_taken(run) or in_slurm in RUNNING:
        return "running"
    if in_slurm in QUEUED:
        return "queued"
    if unnoted:
        return f"stopped: {unnoted}"
    empty = (run / HISTORY).stat().st_size == 0
    return "stopped: killed before it began" if empty else f"unreadable: {HISTORY} holds no start of a run"


def _state(run: Path, starts: list[dict], in_slurm: str | None, config: settings.Config) -> str:
    if lock.is_taken(run) or in_slurm in RUNNING:
        return "running"
    kind = history.end_kind(starts[-1])
    if kind == history.COMPLETE:
        return "complete"
    if in_slurm in QUEUED:
        return "queued"
    if kind == history.FAILED:
        return f"failed: {history.end_reason(starts[-1])}"
    refused = history.why_not_restart(run, config.resume)
    if refused:
        return f"failed: {refused}"
    return f"stopped: {history.end_before_noted(run) or history.end_reason(starts[-1])}"


def _tail(path: Path) -> list[dict]:
    """The last rows of metrics, without reading the whole file; lines that are no rows are left out."""
    try:
        with path.open("rb") as file:
            cut = file.seek(0, os.SEEK_END) > TAIL_BYTES
            file.seek(-TAIL_BYTES if cut else 0, os.SEEK_END if cut else os.SEEK_SET)
            lines = file.read().splitlines()[cut:]
    except FileNotFoundError:
        return []
    return [row for row in json_objects(lines) if isinstance(row.get("step"), int) and _is_finite(row.get("seconds"))]


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < math.inf


def _robust(run: Path) -> tuple[str | None, tuple[str, ...]]:
    """(`41.2 % under linf 2/255` of the newest evaluation, its mean at the first of its radii; which are damaged)."""
    found, damaged = None, []
    for path in sorted((run / EVALUATIONS).glob(f"*/{RESULTS}"), key=lambda p: p.stat().st_mtime, reverse=True):
        try:
            result, whole = opened(json.loads(path.read_bytes()))
            if not whole:
                damaged.append(f"{path.relative_to(run)} is damaged: its content does not fit its digest")
                continue
            averages, norm = result["averages"], result["settings"]["norm"]
            if found is None and averages:
                eps, mean = next(iter(averages["all"]["eps"].items()))
                found = f"{100 * mean['robust']:.1f} % under {norm} {eps} ({path.parent.name})"
        except StopIteration:
            continue  # measured without an attack
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            damaged.append(f"{path.relative_to(run)} cannot be read")
    return found, tuple(damaged)
