"""What Slurm says of this job and of others: nothing where there is no Slurm, and without its accounting (`sacct`)."""

from __future__ import annotations

import os
import re
import subprocess
import time


def job() -> str | None:
    """The id of the job this process belongs to (`12`, or `12_3` for a task of an array); None outside Slurm."""
    # A task of an array by its own name: the last one shares its SLURM_JOB_ID with the array.
    env = os.environ
    if "SLURM_ARRAY_JOB_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env.get("SLURM_JOB_ID")


def restarts() -> int:
    """How often Slurm has put this job back into the queue."""
    return _count("SLURM_RESTART_COUNT")


def starts() -> int:
    """Which start this is of a job's work, from 1.

    It counts Slurm's restarts, and the jobs that went on for one that may not be requeued.
    """
    return restarts() + _count("MMTARD_SUBMITTED_AGAIN") + 1


def _count(name: str) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 9 else 0


def hand_over(old: str, new: str) -> None:
    """Let this user's jobs that wait for job `old` wait for `new`, which goes on for it: `old` ends without being done.

    For a task of an array that jobs wait for as a whole, its other tasks are put in their place one by one, and `new`
    in its own.
    """
    array, _, task = old.partition("_")
    names = {old: new}
    if task:
        names[f"{array}_*"] = ":".join([*sorted(_unfinished_tasks(array) - {old}), new])
    for line in _ask("squeue", "--noheader", "--me", "--states=PENDING", "--format=%i %E").splitlines():
        waiting, _, reasons = line.strip().partition(" ")
        moved = re.sub(r":([\d_*]+)", lambda m: f":{names.get(m[1], m[1])}", re.sub(r"\([^)]*\)", "", reasons))
        if waiting.partition("_")[0] != new.partition("_")[0] and moved != re.sub(r"\([^)]*\)", "", reasons):
            _ask("scontrol", "update", f"JobId={waiting}", f"Dependency={moved}")


def _unfinished_tasks(array: str) -> set[str]:
    """`12_0`, `12_1`, ... of the tasks of array job 12 that have not completed."""
    shown = _ask("squeue", "--noheader", "--array", "--states=all", "--format=%i %T", "--jobs", array)
    return {words[0] for words in map(str.split, shown.splitlines()) if len(words) == 2 and words[1] != "COMPLETED"}


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


def job_fields(job: str) -> dict[str, str]:
    """What `scontrol show job` says of a job, field by field; {} where the controller does not answer."""
    shown = _ask("scontrol", "show", "job", "--oneliner", job)
    return dict(re.findall(r"(?:^|\s)([\w:/]+)=(.*?)(?=\s+[\w:/]+=|\s*$)", shown.partition("\n")[0]))


def _ask(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
