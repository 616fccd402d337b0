"""Submit training to Slurm: one job, a sweep as a job array, or teachers, student and evaluation in their order.

    python launch/submit.py --nodes 4 --partition gpu data.shards=/data/imagenet/train
    python launch/submit.py --dry-run --sweep train.lr=1e-5,2e-5 --sweep seed=0,1,2
    python launch/submit.py --pipeline --evaluate /data/imagenet/val --follow

Settings are checked here, without torch. The code and the configuration are copied into the run folder, and the jobs
use that copy. A job that is told to stop saves its state, goes back to the queue and goes on until the run is complete.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from .. import config as settings, resources
from ..config.argument_types import check_words
from ..errors import UserError
from . import local
from .arguments import job_request, parser
from .follow import Followed, follow
from .plan import Plan, plan
from .request import JobRequest
from .snapshot import Snapshot


def main(argv: list[str] | None = None, prog: str = "submit.py") -> int:
    """Run a command line: 0 done, 1 a followed job failed, 2 the user's to mend, else the exit status of --local."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        check_words(argv)
        return _run(parser(prog, __doc__ or "").parse_intermixed_args(argv))
    except UserError as error:
        print(f"{prog}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; `squeue --me` shows what was submitted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `--dry-run | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(args) -> int:
    request = job_request(args)
    world = request.tasks_per_node if args.local else request.world
    _refuse_positional_config(args.overrides)
    todo = plan(resources.find_config(args.config), args.overrides, args.sweep, args.pipeline, args.evaluate, world)
    for note in (*todo.notes, *(todo.missing if args.dry_run else ())):
        print(f"# {note}")
    if not todo.stages:
        print("# nothing is left to do")
        return 0
    snapshot = Snapshot(todo.folder)
    if not args.local:
        snapshot.refuse_patterns()
    refusal = ""
    if todo.missing and "dependency" not in request.more:
        refusal = f"{todo.missing[0]}, or --slurm dependency=afterok:JOB waits for a job that does"
    if args.dry_run:
        show_plan(todo, request, snapshot)
        if refusal:
            print(f"\n# without --dry-run, submit refuses this: {refusal}")
        return 0
    if refusal:
        raise UserError(refusal)
    if args.python == sys.executable and importlib.util.find_spec("torch") is None:
        raise UserError(f"'{sys.executable}' has no torch; name the Python of the jobs with --python")
    if args.local and shutil.which(args.python) is None:
        raise UserError(f"--python: '{args.python}' is no program here; give the path of a Python that has torch")
    return (
        _here(todo, args.python, snapshot, world) if args.local else submit_plan(todo, request, snapshot, args.follow)
    )


def _refuse_positional_config(overrides: list[str]) -> None:
    """UserError for a configuration that stands where `mmtard train` has it; here --config names it."""
    for text in overrides:
        if "=" not in text:
            raise UserError(f"'{text}' is not of the form key.sub=value; name a configuration with --config {text}")


def show_plan(todo: Plan, request: JobRequest, snapshot: Snapshot) -> int:
    """Print what sbatch would be given for each stage, with JOB_OF_<its name> for the id of each job; 0."""
    from .job import script

    print("# dry run: nothing is written or submitted")
    named: dict[Path, str] = {}  # as the jobs that `submit_plan` waits for: the last one of a run folder
    for stage in todo.stages:
        text = script(stage, request, snapshot, [named[run] for run in stage.after])
        named |= {work.run_dir: f"JOB_OF_{work.job_name}" for work in stage.works if work.config}
        print(f"\n# ==== {stage.title}: sbatch reads\n{text}")
        for i, work in enumerate(stage.works):
            task = f"array task {i}: " if len(stage.works) > 1 else ""
            print(f"# ---- {task}python -m mmtard {' '.join(snapshot.words(work))}")
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


def submit_plan(todo: Plan, request: JobRequest, snapshot: Snapshot, then_follow: bool) -> int:
    """Submit the stages of a plan; 0, or the status of following its jobs. Raises UserError where sbatch refuses."""
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
