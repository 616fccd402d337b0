"""What each run below a folder left there, and where it answers, what Slurm's queue says of it."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .. import config as settings
from ..config import Resume
from ..distributed import slurm
from ..errors import UserError
from ..files import json_objects, opened, refuse_special, why_not_read
from . import history, lock, manifest
from .layout import CHECKPOINTS, CONFIG, EVALUATIONS, HISTORY, METRICS, RESULTS, UNNOTED

RECENT = 20  # steps whose mean speed is shown
TAIL_BYTES = 65536
MOST_SECONDS = 10**12  # of a step
MOST_PASSED_OVER = 3  # checkpoints that are told
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
        found = {*files, *below}
        if HISTORY in found or UNNOTED in found or {CONFIG, CHECKPOINTS} <= found:
            runs.append(Path(path))
            below.clear()
    jobs = {run: _job(run) for run in runs}
    queue = slurm.states({job for job in jobs.values() if job})
    rows = [_row(run, queue.get(jobs[run])) for run in runs]
    return sorted([*rows, *unreadable], key=lambda row: row.run)


def _job(run: Path) -> str | None:
    try:
        refuse_special(run)
        starts = history.read(run)
        with suppress(UserError):  # a note that cannot be read hides no job of the history
            starts += history.starts_before_noted(run)
        job = history.current_job(run, starts[-1]) if starts else None
    except (UserError, OSError):
        return None
    return job if isinstance(job, str) else None


def _row(run: Path, in_slurm: str | None) -> Row:
    try:
        refuse_special(run)
        return _read_row(run, in_slurm)
    except UserError as error:
        return Row(run, f"unreadable: {error}")
    except OSError as error:
        return Row(run, f"unreadable: {why_not_read(error.filename or run, error)}")
    except Exception as error:
        return Row(run, f"unreadable: {type(error).__name__}: {error}")


def _read_row(run: Path, in_slurm: str | None) -> Row:
    starts, lines = history.read_counted(run)
    unnoted, ended, damaged_note = _unnoted(run)
    rows, damaged_metrics = _tail(run / METRICS)
    checkpoint, damaged_checkpoints = _checkpoint(run)
    robust, damaged_results = _robust(run)
    damaged = (*damaged_note, *damaged_metrics, *damaged_checkpoints, *_unlisted(run), *damaged_results)
    known = {**checkpoint, "restarts": max(0, len(starts) + unnoted - 1), "robust": robust}
    # Metrics may be gone or damaged; a saved step was done all the same.
    step = max([checkpoint.get("checkpoint", 0), *(line["step"] for line in starts[-1:] + rows[-1:])])
    if not starts:
        return Row(run, _state_without_start(run, in_slurm, ended, damaged_note), step, damaged=damaged, **known)
    config, damaged_config = _config(run)
    damaged = (*damaged_config, *_left_out(HISTORY, lines, starts), *damaged)
    state = _state(run, starts, in_slurm, ended, config and config.resume)
    if config:
        known |= {"steps": config.train.steps}
    if config and rows:
        seconds = sum(row["seconds"] for row in rows[-RECENT:]) / len(rows[-RECENT:])
        if seconds > 1 / MOST_SECONDS:
            known |= {"images_per_s": config.train.batch_size / seconds}
        if state == "running":
            known |= {"seconds_left": (config.train.steps - step) * seconds}
    return Row(run, state, step, damaged=damaged, **known)


def _checkpoint(run: Path) -> tuple[dict, tuple[str, ...]]:
    """(step and age of the newest checkpoint that has all its files; which newer ones have not)."""
    newest, passed_over = manifest.newest(run)
    # One that a run at work has removed meanwhile, as older than those it keeps, is not damaged.
    there = [why for why in passed_over if os.path.lexists(run / CHECKPOINTS / why.partition(":")[0])]
    damaged = tuple(f"{CHECKPOINTS}/{why}" for why in there[:MOST_PASSED_OVER])
    if newest is None:
        return {}, damaged
    found = {"checkpoint": int(newest.name.removeprefix("step-"))}
    with suppress(FileNotFoundError):
        found |= {"checkpoint_age": time.time() - newest.stat().st_mtime}
    return found, damaged


def _config(run: Path) -> tuple[settings.Config | None, tuple[str, ...]]:
    try:
        return settings.load(run / CONFIG), ()
    except UserError as error:
        return None, (f"{CONFIG} cannot be used: {error}",)


def _left_out(name: str, lines: int, read: list[dict]) -> tuple[str, ...]:
    """What is said of a file of which so many lines were looked at, and not all of them could be read."""
    lost = lines - len(read)
    return (f"{name} is damaged in {lost} of the {lines} lines read, which are left out here",) if lost else ()


def _unnoted(run: Path) -> tuple[int, str | None, tuple[str, ...]]:
    """(how many starts ended before they were noted, how those since the newest noted did; why none can be read)."""
    try:
        n, ended = len(history.unnoted(run)), history.end_before_noted(run)
    except UserError as error:
        return 0, None, (str(error),)
    unknown = not n and os.path.lexists(run / UNNOTED)
    return n, ended, (f"{UNNOTED} holds no start that can be read",) if unknown else ()


def _state_without_start(run: Path, in_slurm: str | None, ended: str | None, damaged_note: tuple[str, ...]) -> str:
    begun = any((run / name).exists() for name in (METRICS, CHECKPOINTS))  # a start in the history comes before these
    if (run / HISTORY).exists():
        if begun or (run / HISTORY).stat().st_size:
            return f"unreadable: {HISTORY} holds no start of a run"
    elif begun or not (ended or damaged_note):
        return f"unreadable: {HISTORY} is gone"
    if lock.is_taken(run) or in_slurm in RUNNING:
        return "running"
    if in_slurm in QUEUED:
        return "queued"
    if damaged_note:  # and nothing else of the run is there
        raise UserError(damaged_note[0])
    return f"stopped: {ended or 'killed before it began'}"


def _state(run: Path, starts: list[dict], in_slurm: str | None, ended: str | None, bounds: Resume | None) -> str:
    if lock.is_taken(run) or in_slurm in RUNNING:
        return "running"
    kind = history.end_kind(starts[-1])
    if kind == history.COMPLETE:
        return "complete"
    if in_slurm in QUEUED:
        return "queued"
    if ended:
        return f"stopped: {ended}"
    if kind == history.FAILED:
        return f"failed: {history.end_reason(starts[-1])}"
    refused = history.why_not_restart(run, bounds) if bounds else None
    if refused:
        return f"failed: {refused}"
    return f"stopped: {history.end_reason(starts[-1])}"


def _tail(path: Path) -> tuple[list[dict], tuple[str, ...]]:
    """(the last rows of metrics, without reading the whole file or lines that are no rows; what cannot be read)."""
    try:
        with path.open("rb") as file:
            cut = file.seek(0, os.SEEK_END) > TAIL_BYTES
            file.seek(-TAIL_BYTES if cut else 0, os.SEEK_END if cut else os.SEEK_SET)
            lines = file.read().splitlines(keepends=True)[cut:]
    except FileNotFoundError:
        return [], ()
    except OSError as error:
        return [], (why_not_read(path, error),)
    if lines and lines[-1].startswith(b"{") and not lines[-1].endswith(b"\n"):
        del lines[-1]  # a row that is being written, or was when the run was killed
    rows = [row for row in json_objects(lines) if _is_row(row)]
    return rows, _left_out(path.name, len(lines), rows)


def _is_row(row: dict) -> bool:
    step, seconds = row.get("step"), row.get("seconds")
    numbers = isinstance(step, int) and isinstance(seconds, int | float)
    return numbers and 0 <= step <= history.MOST_STEPS and 0 <= seconds <= MOST_SECONDS


def _unlisted(run: Path) -> tuple[str, ...]:
    """Why the folders of checkpoints and evaluations cannot be listed, of those that cannot."""
    damaged = []
    for folder in (run / CHECKPOINTS, run / EVALUATIONS):
        try:
            os.listdir(folder)
        except FileNotFoundError:
            continue
        except OSError as error:
            damaged.append(why_not_read(folder, error))
    return tuple(damaged)


def _robust(run: Path) -> tuple[str | None, tuple[str, ...]]:
    """(`41.2 % under linf 2/255` of the newest evaluation, its mean at the first of its radii; which are damaged)."""
    found, damaged = None, []
    for path in sorted((run / EVALUATIONS).glob(f"*/{RESULTS}"), key=lambda p: p.stat().st_mtime, reverse=True):
        name = path.relative_to(run)
        try:
            result, whole = opened(json.loads(path.read_bytes()))
            if not whole:
                damaged.append(f"{name} is damaged: its content does not fit its digest")
                continue
            averages, norm = result["averages"], result["settings"]["norm"]
            if found is None and averages:
                eps, mean = next(iter(averages["all"]["eps"].items()))
                if not 0 <= mean["robust"] <= 1:
                    damaged.append(
                        f"{name} is damaged: its robust accuracy is no share; remove it, and evaluate the model again"
                    )
                    continue
                found = f"{100 * mean['robust']:.1f} % under {norm} {eps} ({path.parent.name})"
        except StopIteration:
            continue  # measured without an attack
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            damaged.append(f"{name} cannot be read")
    return found, tuple(damaged)
