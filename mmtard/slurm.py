"""What Slurm says of this job and of others: nothing where there is no Slurm, and without its accounting (`sacct`)."""

from __future__ import annotations

import os
import subprocess
import time


def job() -> str | None:
    """The id of the job this process belongs to (`12`, or `12_3` for a task of an array); None outside Slurm."""
    env = os.environ
    if "SLURM_ARRAY_JOB_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env.get("SLURM_JOB_ID")


def restarts() -> int:
    """How often Slurm has put this job back into the queue."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def seconds_left() -> float | None:
    """Until this job's time is up; None outside Slurm, without a limit, and where Slurm does not answer."""
    if "SLURM_JOB_END_TIME" in os.environ:  # since Slurm 23.02
        return float(os.environ["SLURM_JOB_END_TIME"]) - time.time()
    if "SLURM_JOB_ID" not in os.environ:
        return None
    return parse_duration(_ask("squeue", "--noheader", "--jobs", os.environ["SLURM_JOB_ID"], "--format=%L").strip())


def parse_duration(text: str) -> float | None:
    """Seconds of Slurm's `[days-][[hours:]minutes:]seconds`; None for its words, such as UNLIMITED."""
    days, _, clock = text.rpartition("-")
    try:
        parts = [int(part) for part in clock.split(":")]
        return int(days or 0) * 86400 + sum(n * 60**i for i, n in enumerate(reversed(parts)))
    except ValueError:
        return None


def states(jobs: set[str]) -> dict[str, str]:
    """Job id -> PENDING, RUNNING, ... of those of these jobs that are in the queue."""
    if not jobs:
        return {}
    # Asked for one job by its id, squeue answers with an error when it is no longer there.
    shown = _ask("squeue", "--noheader", "--array", "--states=all", "--format=%i %T")
    found = (line.split() for line in shown.splitlines())
    return {words[0]: words[1] for words in found if len(words) == 2 and words[0] in jobs}


def _ask(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
