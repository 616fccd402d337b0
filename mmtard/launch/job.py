"""The Slurm side: what sbatch is told, and how a stage becomes a job or a job array, through submitit."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
from dataclasses import replace

from ..errors import UserError
from .plan import Stage
from .request import JobRequest
from .requeue import outside
from .snapshot import Snapshot
from .task import Task

try:
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError
except ImportError:
    raise UserError("submitit is missing in this Python; install it: python -m pip install submitit") from None

# A signal to the job reaches a rank's Python while it starts, and would end it: ignored until `Task` listens.
SHIELD = ("sh", "-c", 'trap "" USR2 TERM INT; exec "$@"', "sh")


def script(stage: Stage, request: JobRequest, snapshot: Snapshot, after: list[str]) -> str:
    """The exact text that sbatch is given for a stage; after: what stands for the ids of the jobs that it waits for."""
    executor = _executor(stage, request, snapshot, after)
    if len(stage.works) > 1:
        executor.parameters["map_count"] = len(stage.works)
    return executor._make_submission_file_text(executor._submitit_command_str, uid="")


def check_slurm(instead: str) -> None:
    """Raise UserError where there is no sbatch. instead: what does the work on this machine."""
    if shutil.which("sbatch") is None:
        raise UserError(
            f"no Slurm here (sbatch is not on the PATH); {instead}, --dry-run shows what would be submitted"
        )


def submit(stage: Stage, request: JobRequest, snapshot: Snapshot, after: list[str]) -> list[submitit.Job]:
    """One job for each work, as an array if there are several; after: ids of the jobs to wait for."""
    check_slurm("--local runs it on this machine")
    tasks = [Task(snapshot.words(work), snapshot.jobs) for work in stage.works]
    for name in os.environ.keys() - outside().keys():  # of a job that this is called in
        del os.environ[name]
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints there what the exception says too
            return _executor(stage, request, snapshot, after).submit_array(tasks)
    except (FailedJobError, FailedSubmissionError) as error:
        words = " ".join(str(error).split())
        raise UserError(f"sbatch refused the job: {words}; {_remedy(words, request)}") from None


def _remedy(words: str, request: JobRequest) -> str:
    if "node configuration is not available" not in words:
        return "correct the flag it names, or add one with --slurm key=value"
    cores = request.tasks_per_node * request.cpus_per_task
    return (
        f"no node has {request.gpus_per_node} GPUs and {cores} cores; lower --gpus-per-node or --cpus-per-task, "
        "or name a --partition that has such nodes (`sinfo -o '%P %c %G'` lists them)"
    )


class _Executor(submitit.SlurmExecutor):
    """Writes the text of a job also where there is no Slurm."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def _executor(stage: Stage, request: JobRequest, snapshot: Snapshot, after: list[str]) -> _Executor:
    if not stage.works[0].config:
        request = replace(request, nodes=1)
    more = {"requeue": True, "signal": f"USR2@{request.lead}", **request.more}
    if "no_requeue" in more:  # for clusters that forbid it: `Task` submits the job again instead
        del more["requeue"]
    first = more.pop("dependency", None)  # what the user waits for, the whole plan waits for
    waits = [*([first] if first else []), *([f"afterok:{':'.join(after)}"] if after else [])]
    if after:
        more["kill_on_invalid_dep"] = "yes"  # otherwise it would wait for ever for a job that failed
    executor = _Executor(snapshot.jobs, python=shlex.join([*SHIELD, request.python]))
    executor.update_parameters(
        job_name=request.job_name
        or (stage.works[0].job_name if len(stage.works) == 1 else f"mmtard-{snapshot.folder.parents[1].name}"),
        nodes=request.nodes,
        ntasks_per_node=request.tasks_per_node,
        gpus_per_node=request.gpus_per_node or None,
        cpus_per_task=request.cpus_per_task,
        time=request.minutes,
        # All of a node's memory with all of its GPUs.
        mem=request.mem or ("0" if request.exclusive else None),
        exclusive=request.exclusive or None,
        partition=request.partition,
        account=request.account,
        qos=request.qos,
        constraint=request.constraint,
        dependency=",".join(waits) or None,
        array_parallelism=request.at_once,
        wckey=None,
        stderr_to_stdout=True,
        setup=_setup(request, snapshot),
        # A rank that ends badly leaves the others waiting for it in a collective: end them, too.
        srun_args=["--kill-on-bad-exit=1", "--open-mode=append", *request.srun],
        additional_parameters=more,
    )
    return executor


def _setup(request: JobRequest, snapshot: Snapshot) -> list[str]:
    """The first lines of the job's shell: the user's own file, the code, and where the ranks meet."""
    own = [f". {shlex.quote(request.setup)} || exit"] if request.setup else []
    return [
        *own,
        # The snapshot before an installed mmtard, and the directory that the job was submitted in not at all.
        f"export PYTHONSAFEPATH=1 PYTHONPATH={shlex.quote(str(snapshot.code))}${{PYTHONPATH:+:$PYTHONPATH}}",
        f"exports=$({shlex.quote(request.python)} -m mmtard.launch.environment) || exit",
        'eval "$exports"',
    ]
