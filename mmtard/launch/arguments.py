"""The command line of a submission: what to run, how, and what the job asks Slurm for."""

from __future__ import annotations

import argparse
import os
import re
import sys

from ..config.argument_types import natural, path, path_text, positive
from ..errors import UserError
from .request import DEFAULT_CONFIG, JobRequest, minutes, words_of

# What --slurm may not set, since the checks and the requeueing here would not know of it: the flag that does.
FLAG_OF = {
    "signal": "--signal-lead",
    "array": "--sweep",
    "ntasks": "--gpus-per-node",
    "ntasks_per_node": "--gpus-per-node",
    "nodes": "--nodes",
    "gpus_per_node": "--gpus-per-node",
    "cpus_per_task": "--cpus-per-task",
    "time": "--time",
    "mem": "--mem",
    "partition": "--partition",
    "account": "--account",
    "qos": "--qos",
    "constraint": "--constraint",
    "reservation": "--reservation",
    "job_name": "--job-name",
}
NOBODYS = ("requeue", "output", "error", "open_mode")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are UserErrors, which the program prints in its own way."""

    def error(self, message: str):
        """Raise UserError in place of printing the usage and ending the process."""
        raise UserError(f"{message} (--help lists the flags)")


def parser(prog: str, description: str) -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    p = Parser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_work(p)
    _add_way(p)
    add_job(p.add_argument_group("the job"))
    add_cluster(p.add_argument_group("the cluster"))
    return p


def _add_work(p: argparse.ArgumentParser) -> None:
    settings = "settings over those of the file, e.g. train.lr=1e-5"
    p.add_argument("overrides", nargs="*", metavar="key=value", help=settings)
    config = f"a path, or a name of `mmtard configs` (default {DEFAULT_CONFIG})"
    p.add_argument("--config", type=path, default=DEFAULT_CONFIG, metavar="YAML", help=config)
    what = p.add_argument_group("what")
    what.add_argument(
        "--sweep",
        "--array",
        action="append",
        default=[],
        metavar="KEY=A,B,...",
        help="one run of each value, as a job array; several: of each combination",
    )
    at_once = "most jobs of a --sweep that run together (default 256)"
    what.add_argument("--at-once", type=positive, metavar="N", help=at_once)
    what.add_argument(
        "--pipeline",
        action="store_true",
        help="first train the teachers that configurations in teachers/, beside YAML, describe; not complete ones",
    )
    what.add_argument(
        "--evaluate",
        type=path_text,
        action="append",
        default=[],
        metavar="SHARDS",
        help="then evaluate the run on these shards; may be repeated",
    )


def _add_way(p: argparse.ArgumentParser) -> None:
    how = p.add_mutually_exclusive_group()
    how.add_argument(
        "--dry-run",
        action="store_true",
        help="print what sbatch would be given and the resolved settings; write and submit nothing",
    )
    local = "run it here, without Slurm, as --gpus-per-node processes (default 1)"
    how.add_argument("--local", action="store_true", help=local)
    how.add_argument("--follow", action="store_true", help="show the logs until the jobs end")


def add_job(job: argparse._ArgumentGroup) -> None:
    """The flags that say what a job is."""
    job.add_argument("--nodes", type=positive, default=1, metavar="N")
    ranks = "one rank each (default 8); 0: one rank a node, without a GPU"
    job.add_argument("--gpus-per-node", type=natural, metavar="N", help=ranks)
    cores = "for a rank and its loader processes (default 12)"
    job.add_argument("--cpus-per-task", type=positive, default=12, metavar="N", help=cores)
    limit = "M, H:MM:SS or D-HH:MM:SS (default 24:00:00); a run may need many such stretches"
    job.add_argument("--time", default="24:00:00", help=limit)
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


def add_cluster(cluster: argparse._ArgumentGroup) -> None:
    """The flags that say where and how a cluster runs it."""
    for name in ("partition", "account", "qos", "constraint", "reservation", "job-name"):
        cluster.add_argument(f"--{name}", metavar="NAME")
    cluster.add_argument(
        "--slurm",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any other flag of sbatch, e.g. --slurm mail-type=END",
    )
    python = "the Python of the jobs, which has torch (default: this one)"
    cluster.add_argument("--python", default=sys.executable, metavar="PATH", help=python)
    cluster.add_argument(
        "--setup",
        type=path,
        default=os.environ.get("MMTARD_SETUP") or None,
        metavar="FILE",
        help="shell lines that the job begins with, such as `module load` (default: $MMTARD_SETUP)",
    )
    cluster.add_argument(
        "--srun",
        default=os.environ.get("MMTARD_SRUN", ""),
        metavar="WORDS",
        help="words after srun's own flags, such as `apptainer exec --nv IMAGE` (default: $MMTARD_SRUN)",
    )


def job_request(args: argparse.Namespace) -> JobRequest:
    """What the flags ask Slurm for. Raises UserError for what cannot be asked, or not so."""
    limit = minutes(args.time)
    if limit * 60 <= args.signal_lead:
        raise UserError(
            f"--signal-lead: a warning {args.signal_lead} s ahead needs more than "
            f"the {limit} min of --time {args.time}; lower it or ask for more time"
        )
    if args.setup and not args.setup.is_file():
        raise UserError(f"--setup: '{args.setup}' is no file; give the shell lines that the job begins with")
    if args.mem is not None and not re.fullmatch("[0-9]+([KMGTkmgt][Bb]?)?", args.mem):
        raise UserError(f"--mem: '{args.mem}' is not an amount of memory; write MB, or a unit of K, M, G or T: 200G")
    if args.at_once and not args.sweep:
        raise UserError("--at-once: says how many runs of a --sweep go side by side; add one, or leave --at-once out")
    default_gpus = 1 if args.local else 8
    return JobRequest(
        python=args.python,
        nodes=args.nodes,
        gpus_per_node=default_gpus if args.gpus_per_node is None else args.gpus_per_node,
        cpus_per_task=args.cpus_per_task,
        minutes=limit,
        lead=args.signal_lead,
        exclusive=args.exclusive,
        mem=args.mem,
        at_once=args.at_once or JobRequest.at_once,
        job_name=args.job_name,
        partition=args.partition,
        account=args.account,
        qos=args.qos,
        constraint=args.constraint,
        setup=str(args.setup.absolute()) if args.setup else None,
        srun=words_of(args.srun, "--srun"),
        more=_more(args),
    )


def _more(args: argparse.Namespace) -> dict[str, str | bool]:
    more: dict[str, str | bool] = {"reservation": args.reservation} if args.reservation else {}
    for text in args.slurm:
        flag, sep, value = text.lstrip("-").partition("=")
        key = flag.replace("-", "_")
        if not key or (sep and not value):
            raise UserError(f"--slurm: '{text}' is not of the form key=value")
        if not re.fullmatch("[A-Za-z][A-Za-z0-9_]*", key):
            raise UserError(f"--slurm: '{flag}' is no flag of sbatch; write one as sbatch --help lists it")
        if key in FLAG_OF:
            raise UserError(f"--slurm: '{key}' is set by {FLAG_OF[key]}")
        if key in NOBODYS:
            raise UserError(f"--slurm: requeueing and the logs rest on '{key}'; leave it out")
        more[key] = value if sep else True
    return more
