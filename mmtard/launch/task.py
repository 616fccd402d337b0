"""What each task of a submitted job does: run mmtard, pass signals on, and send the job back to the queue."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from ..distributed import slurm
from ..distributed.interruption import EXIT_REQUEUE, Interruption
from .requeue import MAX_REQUEUES, CannotGoOnError, go_on, ignore_signals, may_start
from .resubmit import submit_folder_again

POLL_S, LOOK_EVERY_S = 1.0, 5.0
FIRST_RANKS_TURN_S = 15
# For mmtard's ranks to notice that another one was killed, and to end. One that waits in a GPU's kernel never does.
SURVIVORS_TURN_S = 60
# For every task to say how its rank ended; longer than mmtard's watchdog needs to notice that a rank hangs.
OTHERS_TURN_S = 15 * 60


class Task:
    """`python -m mmtard WORDS` as a callable that submitit stores and calls in every task of the job.

    Returns 0. Raises RuntimeError for any other end of mmtard, which submitit keeps as the job's result and which ends
    the other ranks; SystemExit where there is no result yet: 0 when the job goes back to the queue, 75 when that is
    forbidden and another job goes on for it. mmtard alone decides whether it goes on. There is no `checkpoint` method:
    submitit would call it on one rank, inside a signal handler.
    """

    def __init__(self, words: tuple[str, ...], folder: Path):
        self.words, self.folder = words, folder
        self.received: int | None = None  # the first signal
        self.was_heard = False  # whether mmtard listened when it came
        self.child: subprocess.Popen | None = None

    def __call__(self) -> int:
        self.rank, self.ranks = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
        status = self._run()
        self._note_end(status)
        if status == EXIT_REQUEUE:
            time.sleep(FIRST_RANKS_TURN_S if self.rank else 0)
            self._go_on()
        if status < 0:
            print(f"rank {self.rank} was ended by {signal.Signals(-status).name}", file=sys.stderr, flush=True)
            # This was the only rank, or none of the others failed for a reason of its own.
            ends = self._wait_for_the_others()
            if all(end <= 0 or end == EXIT_REQUEUE for end in ends):
                # Of the signals from outside, this one alone ends a rank that does not listen yet; others are crashes.
                self._go_on("signalled" if {end for end in ends if end < 0} == {-signal.SIGKILL} else "again")
        if status:
            sys.tracebacklimit = 0  # submitit prints and keeps the traceback; the reason is mmtard's line above it
            raise RuntimeError(f"mmtard {self.words[0]} ended with status {status}; the lines above say why")
        return 0

    # ---------------------------------------------------------------- the rank

    def _run(self) -> int:
        """Run mmtard to its end; its exit status, of a signal as minus its number."""
        # In place of submitit's handlers, which would requeue from inside the signal, before anything is saved.
        for number in Interruption.SIGNALS:
            # No terminal belongs to a job; mmtard is started deaf to its end.
            signal.signal(number, signal.SIG_IGN if number == signal.SIGHUP else self._note_signal)
        # Ignored until mmtard listens: it would be ended by one that comes while it starts.
        self.child = subprocess.Popen([sys.executable, "-m", "mmtard", *self.words], preexec_fn=ignore_signals)
        looked, end = time.monotonic(), math.inf
        while True:
            try:
                return self.child.wait(timeout=POLL_S)
            except subprocess.TimeoutExpired:
                now = time.monotonic()
            self._pass_signal_on()
            if end == math.inf and now > looked + LOOK_EVERY_S:
                looked = now
                if any(status < 0 for status in self._ends().values()):
                    end = now + SURVIVORS_TURN_S
            if now > end:
                print(f"rank {self.rank} still waits for a rank that is gone", file=sys.stderr, flush=True)
                self.child.kill()

    def _note_signal(self, number: int, frame) -> None:
        if self.received is None:
            self.received, self.was_heard = number, self._child_handles(number)

    def _pass_signal_on(self) -> None:
        """Send mmtard the signal that came while it did not listen yet, once it does.

        Slurm signals every process of a step, so one that listens has it already. A second SIGINT would end it unsaved.
        """
        if self.received and not self.was_heard and self._child_handles(self.received):
            self.child.send_signal(self.received)
            self.was_heard = True

    def _child_handles(self, number: int) -> bool:
        if self.child is None:
            return False
        try:
            status = Path(f"/proc/{self.child.pid}/status").read_text()
        except OSError:
            return False  # it has ended
        caught = int(status.partition("SigCgt:")[2].split()[0], 16)
        return bool(caught >> (number - 1) & 1)

    # ---------------------------------------------------------------- the other ranks

    def _note_end(self, status: int) -> None:
        """Tell the other tasks of this start how this rank ended."""
        try:
            (self.folder / f"{self._start()}_ended_{self.rank}").write_text(str(status))
        except OSError:
            pass  # they wait longer

    def _ends(self) -> dict[int, int]:
        """Rank -> exit status, of those whose mmtard has ended in this start."""
        ends = {}
        for path in self.folder.glob(f"{self._start()}_ended_*"):
            try:
                ends[int(path.name.rpartition("_")[2])] = int(path.read_text())
            except (OSError, ValueError):
                pass  # it is being written
        return ends

    def _wait_for_the_others(self) -> list[int]:
        """The statuses of the ranks, once all have ended or after the longest time they may take."""
        end = time.monotonic() + OTHERS_TURN_S
        while len(ends := self._ends()) < self.ranks and time.monotonic() < end:
            time.sleep(POLL_S)
        return list(ends.values())

    def _start(self) -> str:
        return f"{slurm.job()}_{slurm.starts()}"

    # ---------------------------------------------------------------- the job

    def _go_on(self, when: str = "again") -> None:
        """Start this job again, once; raises SystemExit where that is done or decided, returns where it must not be.

        when: of `may_start`. Raises RuntimeError where it was started too often or nothing starts it again.
        """
        try:
            (self.folder / f"{slurm.job()}_requeue_{slurm.starts()}").touch(exist_ok=False)
        except FileExistsError:
            raise SystemExit(0) from None  # another task decides
        command, *words = self.words
        if command == "train" and may_start(when, tuple(words)):
            return
        if command != "train" and self.received == signal.SIGINT:
            return  # a person stopped it; a training notes that itself
        if command != "train" and slurm.starts() > MAX_REQUEUES:
            raise RuntimeError(
                f"mmtard {command} was stopped {slurm.starts()} times; submit it again, with more --time, to go on"
            )
        training = tuple(words) if command == "train" else ()
        job, remedy = slurm.job(), "submit it again to go on from what is saved"
        try:
            new = go_on(job, lambda: submit_folder_again(self.folder), remedy, training)
        except CannotGoOnError as error:
            raise RuntimeError(f"job {job} {error}") from None
        # Not 0 when another job goes on, or those that wait for this one to end well would begin.
        raise SystemExit(0 if new in (job, None) else EXIT_REQUEUE)
