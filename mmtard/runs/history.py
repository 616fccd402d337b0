"""How often a run was started and how each start ended, a line a start, and the bounds on starting it again."""

from __future__ import annotations

import json
import time
from datetime import datetime
from pathlib import Path

from .. import config as settings
from ..config import Resume
from ..distributed import slurm
from ..errors import UserError
from ..files import json_objects, note_text, read_json_lines, why_not_read, why_not_written, write_text
from .layout import CHECKPOINTS, HISTORY, SUCCESSOR, UNNOTED
from .manifest import published

# How a start ended. After `stopped` and `failed` nothing starts a run again but the user.
COMPLETE, TIMEOUT, PREEMPTED, LOST, STOPPED, FAILED = "complete", "timeout", "preempted", "lost", "stopped", "failed"
FOR_GOOD = (STOPPED, FAILED)
BOUNDS = {TIMEOUT: "max_timeouts", PREEMPTED: "max_preemptions", LOST: "max_losses"}
BY_A_PERSON = ("SIGINT", "SIGHUP")  # Ctrl-C, and a terminal that was closed
MOST_STEPS = 10**12  # no run has more
TIME = "%Y-%m-%dT%H:%M:%S%z"
NEAR_END_S = 900  # a signal this near to the end of the job's time is taken for Slurm's warning of it


def read(run: Path) -> list[dict]:
    """Return the starts of a run, oldest first; each has an `end` (kind, reason, step, time) once it is known.

    Lines that are no start, such as one that was cut short by an interruption, are left out. Raises UserError for a
    file that cannot be read.
    """
    return read_counted(run)[0]


def read_counted(run: Path) -> tuple[list[dict], int]:
    """(the starts of a run as `read` returns them, how many lines its history has, those that are no start too)."""
    try:
        lines = (run / HISTORY).read_bytes().splitlines()
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise UserError(why_not_read(run / HISTORY, error)) from None
    return [start for start in json_objects(lines) if _is_start(start)], len(lines)


def record_start(run: Path, start: dict) -> None:
    """Add a start, with the time and the Slurm job."""
    _write(run, [*read(run), {"time": _now(), **start, "job": slurm.job(), "restart": slurm.restarts()}])


def add_to_start(run: Path, changed: dict, **found) -> None:
    """Add to the newest start what it `found` after it was recorded, and to its `changed` what of that is new.

    Raises UserError when the start cannot be written, or the history is gone.
    """
    *earlier, newest = _known_starts(run)
    _write(run, [*earlier, {**newest, **found, "changed": {**newest.get("changed", {}), **changed}}])


def record_end(run: Path, kind: str, reason: str, step: int) -> None:
    """Note how the newest start ended.

    The first note stays, but a failure or a person's stop replaces a loss, since it caused the loss. Raises UserError
    when the note cannot be written, or the history is gone.
    """
    *earlier, newest = _known_starts(run)
    known = newest.get("end")
    if known is None or (known["kind"] == LOST and kind in FOR_GOOD):
        _write(run, [*earlier, {**newest, "end": {"time": _now(), "kind": kind, "reason": reason, "step": step}}])


def is_this_jobs(run: Path) -> bool:
    """Whether the newest entry is this very start of this Slurm job: the same job id, the same restart count."""
    here = (slurm.job(), slurm.restarts())
    return any((start.get("job"), start.get("restart")) == here for start in read(run)[-1:])


def record_successor(old: str, new: str, config: str, *overrides: str) -> None:
    """Note the Slurm job that goes on for job `old`, which may not be requeued, in the run folder of a configuration.

    The note has a file of its own, because ranks may still write how the start ended. Only people read it, so nothing
    is raised.
    """
    try:
        write_text(Path(settings.load(config, overrides).run_dir) / SUCCESSOR, f"{old} {new}\n")
    except (OSError, UserError):
        pass


def current_job(run: Path, start: dict) -> str | None:
    """Return the Slurm job of a run's newest start, or the one that goes on for it; None outside Slurm."""
    try:
        old, new = (run / SUCCESSOR).read_text().split()
    except (OSError, ValueError):
        return start.get("job")
    return new if start.get("job") == old else start.get("job")


def end_kind(start: dict) -> str:
    """Return how a start ended. One that left no note was killed, or its node was lost."""
    return str(start["end"]["kind"]) if start.get("end") else LOST


def end_reason(start: dict) -> str:
    """Return why a start ended, in words."""
    return str(start["end"]["reason"]) if start.get("end") else "ended without a word: killed, or its node lost"


def kind_of_stop(signal: str | None) -> str:
    """Return what a signal to a run meant. Slurm's warnings differ by the time that the job has left."""
    if signal in BY_A_PERSON:
        return STOPPED
    left = slurm.seconds_left()
    return TIMEOUT if left is not None and left < NEAR_END_S else PREEMPTED


def why_not_restart(run: Path, bounds: Resume, step: int | None = None) -> str | None:
    """Return why a run must not be started again, or None when it may.

    step: of the checkpoint it would go on from; None: the newest published one.
    """
    starts = read(run)
    if not starts or end_kind(starts[-1]) == COMPLETE:
        return None
    for kind, key in BOUNDS.items():
        alike = [start for start in starts if end_kind(start) == kind]
        most = getattr(bounds, key)
        if most is not None and len(alike) > most:
            return (
                f"{len(alike)} starts ended as {kind}, the last with: {end_reason(alike[-1])}; "
                f"resume.{key} allows {most}, raise it to go on"
            )
    step = newest_step(run) if step is None else step
    stuck = 0
    for start in reversed(starts):
        if start["step"] != step or end_kind(start) not in BOUNDS:
            break
        stuck += 1
    if stuck >= bounds.max_starts_without_progress:
        return (
            f"the last {stuck} starts began at step {step} and left no newer checkpoint, the last with: "
            f"{end_reason(starts[-1])}; mend the cause, then go on with resume.max_starts_without_progress={stuck + 1}"
        )
    return None


def why_not_restart_job(run: Path) -> str | None:
    """Return why the job of the newest start must not start the run again by itself; None when the bounds allow it."""
    if not is_this_jobs(run):
        return "this start ended before the run's folder was prepared, the next would, too; its lines above say why"
    newest = read(run)[-1]
    if end_kind(newest) not in FOR_GOOD:
        return None
    return (
        f"this start ended as {end_kind(newest)}: {end_reason(newest)}; "
        "it is not repeated by itself, submit it again to go on from the last checkpoint"
    )


def why_not_restart_signalled(run: Path, most: int) -> str | None:
    """Return why this job must not start the run again, whose start a signal ended; None when the bounds allow it.

    A start that had not come into the history yet is noted beside it; of such starts in a row, that of number `most` is
    not repeated, and the next one begins another row. Raises UserError when the note cannot be read or written.
    """
    if is_this_jobs(run):
        return why_not_restart_job(run)
    in_a_row = len(_since_refused(starts_before_noted(run))) + 1
    refused = in_a_row >= most
    here = {"time": _now(), "job": slurm.job(), "restart": slurm.restarts(), "after": len(read(run))}
    lines = [*unnoted(run), {**here, "refused": True} if refused else here]
    try:
        run.mkdir(parents=True, exist_ok=True)
        note_text(run / UNNOTED, "".join(json.dumps(line) + "\n" for line in lines))
    except OSError as error:
        raise UserError(why_not_written(run / UNNOTED, error)) from None
    if not refused:
        return None
    return (
        f"a signal ended {in_a_row} starts in a row before the run's folder was prepared, as many as "
        "resume.max_starts_without_progress lets end so; the lines above say which: a warning that comes so early "
        "wants more --time, a kill may be for want of memory; then submit the run again"
    )


def unnoted(run: Path) -> list[dict]:
    """Return the starts that a signal ended before they came into the history, oldest first.

    Each has its job, and `after`: how many starts the history had. Raises UserError for a file that cannot be read.
    """
    try:
        return [start for start in read_json_lines(run / UNNOTED) if type(start.get("after")) is int]
    except OSError as error:
        raise UserError(why_not_read(run / UNNOTED, error)) from None


def starts_before_noted(run: Path) -> list[dict]:
    """Return those of the `unnoted` starts that came after the newest one of the history."""
    starts = read(run)
    notes = [note for note in unnoted(run) if note["after"] == len(starts)]
    return [note for note in notes if not any(_is_older(note, start) for start in starts[-1:])]


def end_before_noted(run: Path) -> str | None:
    """Return in words how `starts_before_noted` ended; None where there are none."""
    starts = starts_before_noted(run)
    if not starts:
        return None
    times = "once" if len(starts) == 1 else f"{len(starts)} times"
    given_up = ", and it was not started again" if _is_refused(starts[-1]) else ""
    return f"ended by a signal before its folder was prepared, {times}{given_up}"


def _since_refused(starts: list[dict]) -> list[dict]:
    refused = [i for i, start in enumerate(starts) if _is_refused(start)]
    return starts[refused[-1] + 1 :] if refused else starts


def _is_refused(start: dict) -> bool:
    return start.get("refused") is True


def _is_older(note: dict, start: dict) -> bool:
    """Whether a note was written before a start. A history that lost lines may be as long again as it was then."""
    try:
        return datetime.strptime(note["time"], TIME) < datetime.strptime(start["time"], TIME)
    except (KeyError, TypeError, ValueError):  # one of them does not tell
        return False


def newest_step(run: Path) -> int:
    """Return the step of the newest published checkpoint, whole or not; 0 without one."""
    return max(published(run / CHECKPOINTS), default=0)


def _known_starts(run: Path) -> list[dict]:
    starts = read(run)
    if not starts:
        raise UserError(
            f"'{run / HISTORY}' is gone: the run's folder was moved or removed while the run went on; "
            "start the run again where its checkpoints are"
        )
    return starts


def _is_start(start: dict) -> bool:
    step, end = start.get("step"), start.get("end")
    known_end = end is None or (isinstance(end, dict) and {"kind", "reason"} <= end.keys())
    return type(step) is int and 0 <= step <= MOST_STEPS and known_end


def _write(run: Path, starts: list[dict]) -> None:
    try:
        note_text(run / HISTORY, "".join(json.dumps(start) + "\n" for start in starts))
    except OSError as error:
        raise UserError(why_not_written(run / HISTORY, error)) from None


def _now() -> str:
    return time.strftime(TIME)
