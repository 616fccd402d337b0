"""The command `study`: methods tuned alike, trained with seeds, measured by one protocol, compared on one page."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from ..config.argument_types import path
from ..distributed.interruption import Interruption
from ..errors import UserError
from .command import add_command


def add(commands) -> None:
    """Add the command to the command line."""
    from ..launch.arguments import add_cluster, add_job

    p = add_command(
        commands,
        "study",
        _study,
        "Compare methods with seeds: tune all on one grid, train what is missing, measure all alike, write a page.",
        "mmtard study shapes --dry-run\n         mmtard study cifar data.source=../shared/data --out runs/cifar",
        more="Interrupted at any point, the same command goes on. Status 75 where it was asked to stop.",
    )
    p.add_argument("study", type=_study_path, metavar="CONFIG", help="YAML file, or the name of one of mmtard's own")
    p.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="settings over those of the file, e.g. seeds=[0] settings.train.steps=50",
    )
    p.add_argument("--out", type=path, metavar="DIR", help="the study's folder (default: as the file says)")
    p.add_argument("--dry-run", action="store_true", help="a table of what is done and missing; nothing is written")
    p.add_argument(
        "--page", action="store_true", help="write the page of what is there, complete or not; train nothing"
    )
    p.add_argument(
        "--jobs",
        choices=("here", "slurm"),
        default="here",
        help="slurm: the trainings as a job array, with the flags below; a study that tunes is submitted twice",
    )
    p.add_argument("--measure", metavar="RUN", help=argparse.SUPPRESS)  # what a job of a study runs
    add_job(p.add_argument_group("jobs of --jobs slurm"))
    add_cluster(p.add_argument_group("the cluster of --jobs slurm"))
    p.set_defaults(local=False, at_once=None)


def _study_path(text: str) -> Path:
    from ..study.loading import find_study

    try:
        return find_study(path(text))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _study(args) -> int:
    from ..study import loading, run

    if args.jobs == "here":
        _refuse_flags_of_jobs(args)
    study = loading.load(args.study, args.overrides, args.out)
    command = shlex.join(["mmtard", *sys.argv[1:]])
    if args.measure:
        return _measure(study, args.measure)
    if args.jobs == "slurm":
        return _on_slurm(study, args, command)
    if args.dry_run:
        _check(study)
        run.dry_run(study)
        return 0
    if args.page:
        print(run.write_page(study, command))
        return 0
    _check(study)
    page = run.run_here(study, _make, command)
    from ..study import findings, summary

    summary.show(findings.collect(study))
    print(f"Look at it in a browser: {page.resolve().as_uri()}")
    return 0


def _refuse_flags_of_jobs(args) -> None:
    from ..launch.arguments import add_cluster, add_job

    of_jobs = argparse.ArgumentParser(add_help=False)
    add_job(of_jobs.add_argument_group())
    add_cluster(of_jobs.add_argument_group())
    for name, default in vars(of_jobs.parse_args([])).items():
        if getattr(args, name) != default:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag}: says what a job asks Slurm for; add --jobs slurm, or leave {flag} out")


def _on_slurm(study, args, command: str) -> int:
    from ..launch.arguments import job_request
    from ..study import cluster, run

    if not all(item.done for item in run.items(study)):
        _check(study)
    status = cluster.submit(study, _make, job_request(args), args.dry_run)
    if not args.dry_run and all(item.done for item in run.items(study)):
        print(run.write_page(study, command))
    return status


def _measure(study, key: str) -> int:
    """What a job of `--jobs slurm` does: measure one run, or go on measuring it. Collective over its ranks."""
    from ..study import worker
    from ..study.measures import start_configuration
    from ..study.plan import asked_by_key

    todo = worker.measurements(study, asked_by_key(study, key))
    with Interruption() as interruption:
        worker.measure(todo, interruption, start_configuration(study).engine.device)
    return 0


def _check(study) -> None:
    from ..examples.materials import check

    check(study)


def _make(study) -> None:
    from ..examples.materials import make

    make(study)
