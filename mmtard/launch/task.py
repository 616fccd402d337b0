"""What each task of a submitted job does: run mmtard, pass signals on, and send a run that saved itself back to the queue."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from ..distributed import slurm
from ..runs import history
from .requeue import submit_again

REQUEUE = 75  # mmtard's exit status for "start me again": told to stop and saved, or another rank was lost
SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
FIRST_RANKS_TURN_S = 15
# Longer than mmtard's ranks need to notice that one of them hangs; while one of them is still about, it decides.
OTHERS_TURN_S = 15 * 60
MOST = 20  # requeues of what keeps no account of its own starts, and might never come to its end


class Task:
    """`python -m mmtard WORDS` as a callable that submitit stores and calls in every task of the job.

    Returns 0. Raises RuntimeError for any other end of mmtard, which submitit keeps as the job's result and which ends the
    other ranks; SystemExit where there is no result yet: 0 when the job goes back to the queue, 75 when that is forbidden and another
    job goes on for it. mmtard alone decides whether it goes on. There is no `checkpoint` method: submitit would call it on one rank, inside a signal handler.
    """

    def __init__(self, words: tuple[str, ...], folder: Path):
        self.words, self.folder = words, folder
        self.told: int | None = None

    def __call__(self) -> int:
        status, rank = self._run(), int(os.environ["SLURM_PROCID"])
        if status == REQUEUE:
            time.sleep(FIRST_RANKS_TURN_S if rank else 0)
            raise SystemExit(self._go_on())
        if status < 0:
            print(f"rank {rank} was ended by {signal.Signals(-status).name}", file=sys.stderr, flush=True)
            if int(os.environ["SLURM_NTASKS"]) > 1:
                time.sleep(OTHERS_TURN_S)
            if self._may_start_again():  # this was the only rank, or none of the others could decide
                raise SystemExit(self._go_on())
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

    def _may_start_again(self) -> bool:
        """Whether the history of the run that this trains, and its bounds, allow another start; mmtard prints why not."""
        command = [sys.executable, "-m", "mmtard", "config", "--may-start", "again", *self.words[1:]]
        return (
            self.words[0] == "train"
            and subprocess.run(command, stdout=subprocess.DEVNULL, preexec_fn=_ignore).returncode == 0
        )

    def _note(self, number, frame) -> None:
        self.told = self.told or number

    def _go_on(self) -> int:
        """Start this job again, once, unless somebody decided otherwise: `scontrol requeue` would bring a cancelled job back to life.

        The exit status: not 0 when another job goes on, or those that wait for this one to end well would begin.
        """
        job, restarts = slurm.job(), slurm.starts() - 1
        try:
            (self.folder / f"{job}_requeue_{restarts + 1}").touch(exist_ok=False)
        except FileExistsError:
            return 0
        if self.words[0] != "train" and restarts >= MOST:
            raise RuntimeError(
                f"mmtard {self.words[0]} was stopped {restarts + 1} times; submit it again, with more --time, to go on"
            )
        state = subprocess.run(
            ["squeue", "--noheader", "--format=%T", "--jobs", job], capture_output=True, text=True
        ).stdout.strip()
        if state not in ("RUNNING", "SIGNALING", ""):
            print(f"job {job} is {state}: it is not requeued from here, its last checkpoint stays", flush=True)
            return 0
        print(f"job {job} goes back to the queue", flush=True)
        # Requeueing ends the job with a SIGTERM to all its processes, scontrol too.
        done = subprocess.run(["scontrol", "requeue", job], preexec_fn=_ignore, capture_output=True, text=True)
        if done.returncode == 0:
            return 0
        refused = " ".join(done.stderr.split())
        try:
            new = submit_again(self.folder)
            print(f"job {job} may not be requeued ({refused}); submitted again as job {new}", flush=True)
            if self.words[0] == "train":
                history.record_successor(job, new, self.words[-1])
        except (RuntimeError, OSError) as error:
            raise RuntimeError(
                f"job {job} could neither be requeued ({refused}) nor submitted again ({error}); submit it to go on from the last checkpoint"
            ) from None
        return REQUEUE


def _ignore() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
