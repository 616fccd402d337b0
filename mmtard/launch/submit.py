"""Submit training to Slurm: one job, a sweep as a job array, or teachers, student and evaluation in their order.

    python launch/submit.py --nodes 4 --partition gpu data.shards=/data/imagenet/train
    python launch/submit.py --dry-run --sweep train.lr=1e-5,2e-5 --sweep seed=0,1,2
    python launch/submit.py --pipeline --evaluate /data/imagenet/val --follow

Settings are checked here, without torch. The code and the configuration are copied into the run folder, and the jobs use
that copy. A job that is told to stop saves its state, goes back to the queue and goes on until the run is complete.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
from pathlib import Path

from .. import config as settings
from ..config.argument_types import natural, positive
from ..errors import UserError
from . import local
from .follow import Followed, follow
from .plan import Plan, plan
from .snapshot import Snapshot

# What --slurm may not set, since the checks and the requeueing here would not know of it: the flag that does, if one may.
OURS = {
    "signal": "--signal-lead",
    "array": "--sweep",
    "ntasks": "--gpus-per-node",
    "ntasks_per_node": "--gpus-per-node",
}
for _name in (
    "nodes",
    "gpus_per_node",
    "cpus_per_task",
    "time",
    "mem",
    "partition",
    "account",
    "qos",
    "constraint",
    "reservation",
    "job_name",
):
    OURS[_name] = f"--{_name.replace('_', '-')}"
NOBODYS = ("requeue", "output", "error", "open_mode")


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (--help lists the flags)")


def main(argv: list[str] | None = None) -> int:
    """Run a command line; the exit status: 0 done, 1 a followed job failed, 2 the user's to mend, else that of --local."""
    try:
        return _run(parser().parse_intermixed_args(argv))
    except UserError as error:
        print(f"submit.py: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("submit.py: interrupted; `squeue --me` shows what was submitted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `--dry-run | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="submit.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings over those of the file, e.g. train.lr=1e-5"
    )
    p.add_argument(
        "--config",
        type=Path,
        default=Path("configs/vitb32_mmtard.yaml"),
        metavar="YAML",
        help="default configs/vitb32_mmtard.yaml",
    )

    what = p.add_argument_group("what")
    what.add_argument(
        "--sweep",
        "--array",
        action="append",
        default=[],
        metavar="KEY=A,B,...",
        help="one run of each value, as a job array; several: of each combination",
    )
    what.add_argument(
        "--at-once", type=positive, default=256, metavar="N", help="most jobs of an array that run together"
    )
    what.add_argument(
        "--pipeline",
        action="store_true",
        help="first train the teachers that configurations in teachers/, beside YAML, describe and that are not complete",
    )
    what.add_argument(
        "--evaluate",
        action="append",
        default=[],
        metavar="SHARDS",
        help="then evaluate the run on these shards; may be repeated",
    )
    how = p.add_mutually_exclusive_group()
    how.add_argument(
        "--dry-run",
        action="store_true",
        help="print what sbatch would be given and the resolved settings; write and submit nothing",
    )
    how.add_argument(
        "--local", action="store_true", help="run it here, without Slurm, as --gpus-per-node processes (default 1)"
    )
    how.add_argument("--follow", action="store_true", help="show the logs until the jobs end")

    job = p.add_argument_group("the job")
    job.add_argument("--nodes", type=positive, default=1, metavar="N")
    job.add_argument(
        "--gpus-per-node",
        type=natural,
        metavar="N",
        help="one rank each (default 8); 0: one rank a node, without a GPU",
    )
    job.add_argument(
        "--cpus-per-task",
        type=positive,
        default=12,
        metavar="N",
        help="for a rank and its loader processes (default 12)",
    )
    job.add_argument(
        "--time",
        default="24:00:00",
        help="M, H:MM:SS or D-HH:MM:SS (default 24:00:00); a run may need many such stretches",
    )
    job.add_argument(
        "--signal-lead",
        type=positive,
        default=120,
        metavar="SECONDS",
        help="warning before the end, for a step and a checkpoint (default 120)",
    )
    job.add_argument(
        "--exclusive",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whole nodes, with all of their memory (default)",
    )
    job.add_argument("--mem", metavar="SIZE", help="memory of a node, e.g. 200G")
    for name in ("partition", "account", "qos", "constraint", "reservation", "job-name"):
        job.add_argument(f"--{name}", metavar="NAME")
    job.add_argument(
        "--slurm",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any other flag of sbatch, e.g. --slurm mail-type=END",
    )
    job.add_argument(
        "--python",
        default=sys.executable,
        metavar="PATH",
        help="the Python of the jobs, which has torch (default: this one)",
    )
    return p


def _run(args) -> int:
    from . import job

    minutes = job.minutes(args.time)
    if minutes * 60 <= args.signal_lead:
        raise UserError(
            f"--signal-lead: a warning {args.signal_lead} s ahead needs more than the {minutes} min of --time {args.time}; lower it or ask for more time"
        )
    gpus = args.gpus_per_node if args.gpus_per_node is not None else 1 if args.local else 8
    request = job.JobRequest(
        args.python, args.nodes, gpus, args.cpus_per_task, minutes, args.signal_lead, args.exclusive, args.mem, args.at_once,
        args.job_name, args.partition, args.account, args.qos, args.constraint, _more(args),
    )  # fmt: skip
    world = request.tasks_per_node if args.local else request.world
    todo = plan(args.config, args.overrides, args.sweep, args.pipeline, args.evaluate, world)
    for note in todo.notes:
        print(f"# {note}")
    if not todo.stages:
        print("# nothing is left to do")
        return 0
    snapshot = Snapshot(todo.folder)
    if args.dry_run:
        return _show(todo, request, snapshot)
    if args.python == sys.executable and importlib.util.find_spec("torch") is None:
        raise UserError(f"'{sys.executable}' has no torch; name the Python of the jobs with --python")
    if args.local and shutil.which(args.python) is None:
        raise UserError(f"--python: '{args.python}' is no program here; give the path of a Python that has torch")
    return _here(todo, args.python, snapshot, world) if args.local else _submit(todo, request, snapshot, args.follow)


def _more(args) -> dict[str, str | bool]:
    more: dict[str, str | bool] = {"reservation": args.reservation} if args.reservation else {}
    for text in args.slurm:
        key, sep, value = text.lstrip("-").partition("=")
        key = key.replace("-", "_")
        if not key or (sep and not value):
            raise UserError(f"--slurm: '{text}' is not of the form key=value")
        if key in OURS:
            raise UserError(f"--slurm: '{key}' is set by {OURS[key]}")
        if key in NOBODYS:
            raise UserError(f"--slurm: requeueing and the logs rest on '{key}'; leave it out")
        more[key] = value if sep else True
    return more


def _show(todo: Plan, request, snapshot: Snapshot) -> int:
    from . import job

    print("# dry run: nothing is written or submitted")
    for stage in todo.stages:
        print(f"\n# ==== {stage.title}: sbatch reads\n{job.script(stage, request, snapshot)}")
        for i, work in enumerate(stage.works):
            print(
                f"# ---- {f'array task {i}: ' if len(stage.works) > 1 else ''}python -m mmtard {' '.join(snapshot.words(work))}"
            )
            print(settings.dump(work.config) if work.config else "", end="")
    return 0


def _here(todo: Plan, python: str, snapshot: Snapshot, world: int) -> int:
    snapshot.write(todo)
    for work in (work for stage in todo.stages for work in stage.works):
        print(f"# {work.name}: {world} process{'es' * (world > 1)} here, run folder {work.run_dir}", flush=True)
        status = local.run(python, snapshot.words(work), snapshot.code, world)
        if status:
            return status
    return 0


def _submit(todo: Plan, request, snapshot: Snapshot, then_follow: bool) -> int:
    from .job import submit

    snapshot.write(todo)
    submitted: dict[Path, str] = {}  # the training that makes a run folder -> its job
    followed: list[Followed] = []
    for stage in todo.stages:
        try:
            jobs = submit(stage, request, snapshot, [submitted[run] for run in stage.after])
        except UserError as error:
            if not followed:
                snapshot.remove()
                raise
            raise UserError(
                f"{error} (already submitted; to withdraw: scancel {' '.join(f.job for f in followed)})"
            ) from None
        for work, job in zip(stage.works, jobs):
            if work.config:
                submitted[work.run_dir] = job.job_id
            followed.append(Followed(work.name, job.job_id, job.paths.stdout))
            print(
                f"job {job.job_id}: {stage.title}, run folder {work.run_dir}\n  log of rank 0: {job.paths.stdout}",
                flush=True,
            )
    ids = " ".join(f.job for f in followed)
    print(f"the code and settings of these jobs: {snapshot.folder}")
    print(
        f"watch: squeue --jobs {ids.replace(' ', ',')}\n       tail -F {followed[0].log}\nend:   scancel {ids}",
        flush=True,
    )
    return follow(followed) if then_follow else 0
