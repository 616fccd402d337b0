"""The logs of submitted jobs as they grow, until the last job ends."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from .resubmit import successor

PAUSE_S = 2.0  # between two looks at the logs
ENDED = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "PREEMPTED",
    "REVOKED",
)


@dataclass
class Followed:
    """A job whose log is shown: `read` bytes of it so far, and the job's last known Slurm state."""

    name: str
    job: str
    log: Path
    read: int = 0
    state: str = ""


def follow(jobs: list[Followed]) -> int:
    """Print what the logs gain, each line with its job's name if there are several; 0 when all jobs completed.

    Ctrl-C ends the following and leaves the jobs alone.
    """
    try:
        while not all(job.state in ENDED for job in jobs):
            for job in jobs:
                if job.state not in ENDED:
                    _look(job, several=len(jobs) > 1)
            time.sleep(0 if all(job.state in ENDED for job in jobs) else PAUSE_S)
    except KeyboardInterrupt:
        print(f"\nno longer followed; to end them: scancel {' '.join(job.job for job in jobs)}")
        return 130
    return 0 if all(job.state == "COMPLETED" for job in jobs) else 1


def _look(job: Followed, several: bool) -> None:
    state = _state(job.job)  # before the log: what an ended job wrote is all there
    if state in ENDED and (goes_on := successor(job.log.parent, job.job)).is_file():
        job.job = goes_on.read_text()
        state = _state(job.job)
        print(f"-- {job.name} goes on as job {job.job}")
    if job.log.is_file():
        with job.log.open("rb") as log:
            log.seek(job.read)
            grown = log.read()
        whole = len(grown) if state in ENDED else grown.rfind(b"\n") + 1
        job.read += whole
        for line in grown[:whole].decode(errors="replace").splitlines():
            print(f"{job.name}: {line}" if several else line)
    if state != job.state:
        print(f"-- job {job.job} ({job.name}) is {state}")
        job.state = state
    sys.stdout.flush()


def _state(job: str) -> str:
    # Not sacct: many clusters keep no accounts. One that Slurm forgot ended long ago, and nobody says how.
    done = subprocess.run(["scontrol", "show", "job", "--oneliner", job], capture_output=True, text=True)
    if done.returncode:
        return "REVOKED" if "Invalid job id" in done.stderr else "UNKNOWN"
    state = re.search(r" JobState=(\w+)", done.stdout)
    return state[1] if state else "UNKNOWN"
