"""What each task of a submitted job does: run mmtard, pass signals on, and send a run that saved itself back to the queue."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

REQUEUE = 75  # mmtard's exit status for "start me again": told to stop and saved, or another rank was lost
SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
FIRST_RANKS_TURN_S = 15
# Longer than mmtard's ranks need to notice that one of them hangs; while one of them is still about, it decides.
OTHERS_TURN_S = 15 * 60
MOST = 20  # requeues of what keeps no account of its own starts, and might never come to its end


class Task:
    """`python -m mmtard WORDS` as a callable that submitit stores and calls in every task of the job.

    Returns 0. Raises RuntimeError for any other end of mmtard, which submitit keeps as the job's result and which ends the
    other ranks; SystemExit(0) where the job goes back to the queue and there is no result yet. mmtard alone decides whether it
    does. There is no `checkpoint` method: submitit would call it on one rank, inside a signal handler.
    """

    def __init__(self, words: tuple[str, ...], folder: Path):
        self.words, self.folder = words, folder
        self.told: int | None = None

    def __call__(self) -> int:
        status, rank = self._run(), int(os.environ["SLURM_PROCID"])
        if status == REQUEUE:
            time.sleep(FIRST_RANKS_TURN_S if rank else 0)
            self._back_to_the_queue()
            raise SystemExit(0)
        if status < 0:
            print(f"rank {rank} was ended by {signal.Signals(-status).name}", file=sys.stderr, flush=True)
            if int(os.environ["SLURM_NTASKS"]) > 1:
                time.sleep(OTHERS_TURN_S)
        if status:
            sys.tracebacklimit = 0  # submitit prints and keeps the traceback; the reason is mmtard's line above it
            raise RuntimeError(f"mmtard {self.words[0]} ended with status {status}; the lines above say why")
        return 0

    def _run(self) -> int:
        # In place of submitit's handlers, which would requeue from inside the signal, before anything is saved.
        for number in SIGNALS:
            signal.signal(number, self._note)
        # Ignored until mmtard listens: it would be ended by one that comes while it starts.
        child = subprocess.Popen([sys.executable, "-m", "mmtard", *self.words], preexec_fn=_ignore)
        while True:
            try:
                return child.wait(timeout=1)
            except subprocess.TimeoutExpired:
                if self.told:  # again every second, for the same reason
                    child.send_signal(self.told)

    def _note(self, number, frame) -> None:
        self.told = self.told or number

    def _back_to_the_queue(self) -> None:
        """Requeue this job, once, unless somebody decided otherwise: `scontrol requeue` would bring a cancelled job back to life."""
        job, restarts = _job(), int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        try:
            (self.folder / f"{job}_requeue_{restarts + 1}").touch(exist_ok=False)
        except FileExistsError:
            return
        if self.words[0] != "train" and restarts >= MOST:
            raise RuntimeError(f"mmtard {self.words[0]} was stopped {restarts + 1} times; submit it again, with more --time, to go on")
        state = subprocess.run(["squeue", "--noheader", "--format=%T", "--jobs", job], capture_output=True, text=True).stdout.strip()
        if state not in ("RUNNING", "SIGNALING", ""):
            print(f"job {job} is {state}: it is not requeued from here, its last checkpoint stays", flush=True)
            return
        print(f"job {job} goes back to the queue", flush=True)
        # Requeueing ends the job with a SIGTERM to all its processes, scontrol too.
        done = subprocess.run(["scontrol", "requeue", job], preexec_fn=_ignore, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"job {job} could not go back to the queue ({done.stderr.strip()}); submit it again to go on from the last checkpoint")


def _ignore() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _job() -> str:
    # A task of an array by its own name: the last one shares its SLURM_JOB_ID with the array.
    env = os.environ
    return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}" if "SLURM_ARRAY_JOB_ID" in env else env["SLURM_JOB_ID"]
