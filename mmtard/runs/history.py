"""How often a run was started and how each start ended (`resume.jsonl`, a line a start), and the bounds on starting it again."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from pathlib import Path

from .. import config as settings
from ..config import Resume
from ..distributed import slurm
from ..errors import UserError

FILE, SUCCESSOR = "resume.jsonl", "goes_on_as"
# How a start ended. After `stopped` and `failed` nothing starts a run again but the user.
COMPLETE, TIMEOUT, PREEMPTED, LOST, STOPPED, FAILED = "complete", "timeout", "preempted", "lost", "stopped", "failed"
FOR_GOOD = (STOPPED, FAILED)
BOUNDS = {TIMEOUT: "max_timeouts", PREEMPTED: "max_preemptions", LOST: "max_losses"}
NEAR_END_S = 900  # a signal this near to the end of the job's time is taken for Slurm's warning of it


def read(run: Path) -> list[dict]:
    """The starts of a run, oldest first; each has an `end` (kind, reason, step, time) once it is known."""
    starts = []
    try:
        lines = (run / FILE).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            starts.append(json.loads(line))
        except ValueError:
            pass  # cut short by an interruption
    return starts


def record_start(run: Path, start: dict) -> None:
    """Add a start, with the time and the Slurm job."""
    _write(run, [*read(run), {"time": _now(), **start, "job": slurm.job(), "restart": slurm.restarts()}])


def record_end(run: Path, kind: str, reason: str, step: int) -> None:
    """Note how the newest start ended. The first note stays, but a failure or a person's stop replaces a loss: it was the loss's cause."""
    *earlier, newest = read(run)
    known = newest.get("end")
    if known is None or (known["kind"] == LOST and kind in FOR_GOOD):
        _write(run, [*earlier, {**newest, "end": {"time": _now(), "kind": kind, "reason": reason, "step": step}}])


def is_this_jobs(run: Path) -> bool:
    """Whether the newest start was made by this Slurm job since it last came from the queue."""
    return any((start["job"], start["restart"]) == (slurm.job(), slurm.restarts()) for start in read(run)[-1:])


def record_successor(old: str, new: str, config: str, *overrides: str) -> None:
    """Note the Slurm job that goes on for job `old`, which may not be requeued, in the run folder of a configuration.

    In a file of its own: ranks may still note how the start ended. It is for the eye alone, so nothing is raised.
    """
    try:
        (Path(settings.load(config, overrides).run_dir) / SUCCESSOR).write_text(f"{old} {new}\n")
    except (OSError, UserError):
        pass


def current_job(run: Path, start: dict) -> str | None:
    """The Slurm job of a run's newest start, or the one that goes on for it; None outside Slurm."""
    try:
        old, new = (run / SUCCESSOR).read_text().split()
    except (OSError, ValueError):
        return start.get("job")
    return new if start.get("job") == old else start.get("job")


def end_kind(start: dict) -> str:
    """How a start ended. One that could not say so any more was killed, or its node was lost."""
    return start["end"]["kind"] if start.get("end") else LOST


def end_reason(start: dict) -> str:
    return start["end"]["reason"] if start.get("end") else "ended without a word: killed, or its node lost"


def kind_of_stop(signal: str | None) -> str:
    """What a signal to a run meant. SIGINT comes from a person; Slurm's warnings differ by the time the job has left."""
    if signal == "SIGINT":
        return STOPPED
    left = slurm.seconds_left()
    return TIMEOUT if left is not None and left < NEAR_END_S else PREEMPTED


def why_not_restart(run: Path, bounds: Resume, step: int | None = None) -> str | None:
    """Why a run must not be started again, from the checkpoint of `step` (None: the newest published); None when it may."""
    starts = read(run)
    if not starts or end_kind(starts[-1]) == COMPLETE:
        return None
    for what, key in BOUNDS.items():
        such, most = [s for s in starts if end_kind(s) == what], getattr(bounds, key)
        if most is not None and len(such) > most:
            return f"{len(such)} starts ended as {what}, the last with: {end_reason(such[-1])}; resume.{key} allows {most}, raise it to go on"
    step = newest_step(run) if step is None else step
    stuck = 0
    for start in reversed(starts):
        if start["step"] != step or end_kind(start) not in BOUNDS:
            break
        stuck += 1
    if stuck >= bounds.max_starts_without_progress:
        return (
            f"the last {stuck} starts began at step {step} and left no newer checkpoint, the last with: {end_reason(starts[-1])}; "
            f"mend the cause, then go on with resume.max_starts_without_progress={stuck + 1}"
        )
    return None


def why_not_restart_job(run: Path) -> str | None:
    """Why the job of the newest start must not start the run again by itself; None when it may, within the bounds."""
    if not is_this_jobs(run):
        return "this start ended before the run's folder was prepared, the next would, too; its lines above say why"
    newest = read(run)[-1]
    if end_kind(newest) not in FOR_GOOD:
        return None
    return f"this start ended as {end_kind(newest)}: {end_reason(newest)}; it is not repeated by itself, submit it again to go on from the last checkpoint"


def newest_step(run: Path) -> int:
    """The step of the newest published checkpoint, whole or not; 0 without one."""
    found = (re.fullmatch(r"step-(\d+)", p.name) for p in (run / "checkpoints").glob("step-*"))
    return max((int(m[1]) for m in found if m), default=0)


def _write(run: Path, starts: list[dict]) -> None:
    scratch = run / f".{FILE}.{socket.gethostname()}.{os.getpid()}"  # ranks that end together may write together
    scratch.write_text("".join(json.dumps(start) + "\n" for start in starts), encoding="utf-8")
    scratch.replace(run / FILE)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
