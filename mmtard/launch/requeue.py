"""How a job goes on after a start that is not its last: back to the queue, or as another job."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from ..distributed import slurm
from ..distributed.interruption import EXIT_REQUEUE, Interruption
from ..distributed.processes import RANK_VARIABLES
from ..errors import UserError
from .environment import say

OUTSIDE = (signal.SIGUSR2, signal.SIGTERM, signal.SIGKILL)  # what ends a rank that is not to blame for it
# Evaluation and caching do not count their own starts, so this bounds them.
MAX_REQUEUES = 20
TRIES, PAUSE_S = 3, 5.0  # for a controller that is too busy to answer
MAY_GO_ON = ("RUNNING", "SIGNALING", "")  # states of a job; "" where the controller does not say
# What scontrol says where a requeue is forbidden, or impossible, rather than not taken at this moment.
FORBIDDEN = ("disabled", "denied", "permission", "not permitted", "not allowed", "is not on the path")


class CannotGoOnError(RuntimeError):
    """A job could neither be requeued nor be submitted again. The message names the reasons and what is left to do."""


def ignore_signals() -> None:
    """Ignore the signals that ask a run to stop; for children that must outlive them, before they start."""
    for number in Interruption.SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def wants_more(status: int) -> bool:
    """Whether an exit status asks for another start: 75, the state is saved; over 128, a signal ended a rank."""
    return status == EXIT_REQUEUE or status > 128


def from_outside(status: int, said: str) -> bool:
    """Whether a signal ended the ranks that none of them is to blame for: a warning that came before they listened,
    which on a busy node takes seconds, or a kill.

    status: srun's, of signals the largest. said: what the ranks and srun printed in this start. Where a rank fails or
    crashes, Slurm ends the others by a signal, too, so that each rank's end counts, as srun tells it.
    """
    if status not in {128 + number for number in OUTSIDE}:
        return False
    names = "|".join(signal.strsignal(number) or "" for number in OUTSIDE)
    exits = "|".join(str(code) for code in (EXIT_REQUEUE, *(128 + number for number in OUTSIDE)))
    ends = re.findall(r"^srun: error: [^ ]+: tasks? [^:]+: (.*)$", said, re.MULTILINE)
    # An srun that was told to be quiet says nothing of them.
    return all(re.fullmatch(f"({names}|Exited with exit code ({exits}))", end.strip()) for end in ends) and (
        bool(ends) or status == 128 + signal.SIGUSR2
    )


def may_start(when: str, words: tuple[str, ...], launcher: Sequence[str] = (sys.executable,)) -> int:
    """The status of `mmtard config --may-start WHEN WORDS`: 0 when the run of a configuration may be started.

    One message about a wrong setting, or about a run that was started too often or failed, and not one from every rank.
    when: "now"; "again" where this job's own start has just ended; "signalled" where it was `from_outside`.
    words: the configuration and its overrides.
    launcher: what runs Python where the ranks' Python is not this one.
    """
    command = [*launcher, "-m", "mmtard", "config", "--may-start", when, *words]
    try:
        return subprocess.run(command, stdout=subprocess.DEVNULL, preexec_fn=ignore_signals).returncode
    except OSError as error:
        place = f"on {os.uname().nodename}: {error.strerror}"
        raise UserError(f"cannot run '{command[0]}' {place}; MMTARD_PYTHON names the Python of the job") from None


def go_on(
    job: str,
    resubmit: Callable[[], str],
    remedy: str = "the same sbatch command goes on from the saved state",
    training: tuple[str, ...] = (),
) -> str | None:
    """Start a job again, unless somebody decided otherwise: `scontrol requeue` would bring a cancelled job back.

    resubmit: submits the work as another job, to begin when this one has ended, and returns its id; RuntimeError says
    why not.
    training: the configuration of a training and its overrides, whose run folder is told which job goes on.
    Returns the job that goes on: this one, back in the queue, or another; None for one that is no longer ours to start.
    Raises CannotGoOnError, with the `remedy` for the user.
    """
    for attempt in range(TRIES):
        if attempt:
            time.sleep(PAUSE_S)
        fields = slurm.job_fields(job)
        state = fields.get("JobState", "")
        if state not in MAY_GO_ON:
            say(f"is {state}, and is not started again from here", job)
            return None
        if fields.get("Requeue") == "0":
            return _as_another(job, resubmit, "", remedy, training)
        say("goes back to the queue", job)
        refused = _requeue(job)
        if refused is None:
            return job
        if any(word in refused.lower() for word in FORBIDDEN):
            return _as_another(job, resubmit, f" ({refused})", remedy, training)
        if refused:
            say(f"scontrol requeue: {refused}", job)
    raise CannotGoOnError(f"could not go back to the queue; {remedy}")


def _requeue(job: str) -> str | None:
    """Ask Slurm to requeue a job: None when it does, else what it says."""
    try:
        # Requeueing ends the job with a SIGTERM to all its processes, scontrol too.
        command = ["scontrol", "requeue", job]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, preexec_fn=ignore_signals)
    except OSError:
        return "scontrol is not on the PATH here, as in a container without Slurm"
    return None if done.returncode == 0 else " ".join(done.stderr.split())


def _as_another(job: str, resubmit: Callable[[], str], refused: str, remedy: str, training: tuple[str, ...]) -> str:
    try:
        new = resubmit()
    except (RuntimeError, OSError) as error:
        reasons = f"neither go back to the queue{refused} nor be submitted again ({' '.join(str(error).split())})"
        raise CannotGoOnError(f"could {reasons}; {remedy}") from None
    say(f"may not be requeued{refused}; submitted again as job {new}", job)
    slurm.hand_over(job, new)
    if training:
        _tell_the_run(job, new, training)
    return new


def _tell_the_run(old: str, new: str, training: tuple[str, ...]) -> None:
    """Name the new job in the run folder, for `mmtard runs` while that job waits."""
    try:
        # The batch script of a container's job runs in a Python that may have no more than the standard library.
        from ..runs import history
    except ImportError:
        return
    history.record_successor(old, new, *training)


def outside(env: dict[str, str] | None = None) -> dict[str, str]:
    """An environment (this one) without the shape and the ranks of the job it may belong to.

    sbatch would take them for those of the new job.
    """
    env = dict(os.environ) if env is None else env
    shape = ("SLURM_", "SRUN_", "SBATCH_", "SUBMITIT_")
    return {k: v for k, v in env.items() if k == "SLURM_CONF" or not (k in RANK_VARIABLES or k.startswith(shape))}
