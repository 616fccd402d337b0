"""Commands on finished and running runs: runs, report, export, merge."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from .. import config as settings
from ..config.argument_types import natural, path, path_text, positive
from ..errors import UserError
from .command import add_command


def add(commands) -> None:
    """Add the commands of this file to the command line."""
    _add_runs(commands)
    _add_report(commands)
    _add_export(commands)
    _add_merge(commands)


def _add_runs(commands) -> None:
    p = add_command(
        commands,
        "runs",
        _runs,
        "A table of the runs below a folder: state, step, speed, checkpoints, restarts, robustness.",
        "mmtard runs runs",
    )
    p.add_argument("folder", type=path, metavar="DIR")
    p.add_argument("--json", action="store_true", help="a list of objects, for programs")
    p.add_argument(
        "--watch",
        nargs="?",
        type=positive,
        const=10,
        metavar="SECONDS",
        help="print the table anew every so many seconds (10), until Ctrl-C",
    )


def _runs(args) -> None:
    from ..runs import table

    if args.watch:
        table.watch(args.folder, args.watch, args.json)
    else:
        table.show(args.folder, args.json)


def _add_report(commands) -> None:
    p = add_command(
        commands,
        "report",
        _report,
        "One HTML page of runs and models: accuracy under attack, images, health, training, commands; "
        "its figures as PNG, SVG and PDF, its tables as CSV and LaTeX.",
        "mmtard report runs --out reports/all\n"
        "         mmtard report runs/b32 runs/baseline --labels MMT-ARD baseline --out reports/b32",
    )
    p.add_argument(
        "runs",
        nargs="+",
        type=path,
        metavar="RUN",
        help="run folder, a folder of runs, a model folder, or a results.json or folder of them; evaluations of "
        "their weights are found by the weights' hash, below these folders and beside the runs",
    )
    p.add_argument("--out", type=path, required=True, metavar="DIR")
    p.add_argument(
        "--labels",
        action="extend",
        nargs="+",
        metavar="NAME",
        help="how the page calls them: a name for each RUN, or for each model found",
    )
    p.add_argument(
        "--images",
        type=natural,
        default=6,
        metavar="N",
        help="samples of each model that are attacked for the page, on the CPU (default 6; 0: none)",
    )


def _report(args) -> None:
    for run in args.runs:
        if not run.exists():
            raise UserError(f"'{run}' does not exist; give a run's folder, or a results.json or its folder")
    from ..report.page import report

    print(report(args.runs, args.out, args.images, shlex.join(sys.argv), args.labels))


def _add_export(commands) -> None:
    p = add_command(
        commands,
        "export",
        _export,
        "Write a run as a folder that open_clip loads, with the image tower alone and a model card.",
        "mmtard export runs/b32 exported/b32",
    )
    p.add_argument("run_folder", type=path, metavar="RUN", help="run or checkpoint folder")
    p.add_argument("out", type=path, metavar="OUT")
    p.set_defaults(flags={"export.weights": "RUN", "export.ema": "--ema", "leave ema out": "leave --ema out"})
    p.add_argument(
        "--push",
        metavar="ORG/NAME",
        help="also say what would be uploaded to this repository of the Hugging Face Hub; with --yes upload it",
    )
    p.add_argument("--yes", action="store_true", help="really upload with --push; needs your token of the Hub")
    p.add_argument("--hf", action="store_true", help="also OUT/transformers, which transformers' CLIPModel loads")
    p.add_argument("--ema", action="store_true", help="the moving average of the weights that train.ema kept")
    p.add_argument(
        "--merge-lora",
        action="store_true",
        help="fold a run's adapter into the weights; without it, OUT is a peft folder",
    )


def _export(args) -> None:
    if args.yes and not args.push:
        raise UserError("--yes: belongs to --push ORG/NAME; add it, or leave --yes out")
    from ..export.folder import export
    from ..export.push import check_push, push

    if args.push:
        check_push(args.push, args.yes)  # before minutes of work
    model = settings.Model(weights=str(args.run_folder), ema=args.ema)
    for written in export(model, args.out, hf=args.hf, merge_lora=args.merge_lora):
        print(written)
    if args.push:
        print(*push(args.out, args.push, args.yes), sep="\n")


def _add_merge(commands) -> None:
    p = add_command(
        commands,
        "merge",
        _merge,
        "Interpolate the image towers of two models of one architecture and text tower, such as a run and its start.",
        "mmtard merge runs/b32/start runs/b32 --weight 0.7 merged/b32",
    )
    models = "run, checkpoint or model folder, or hf-hub:ORG/NAME"
    p.add_argument("a", type=path_text, metavar="A", help=models)
    p.add_argument("b", type=path_text, metavar="B", help=models)
    p.add_argument("--weight", type=float, required=True, metavar="W", help="part of B, from 0 (A alone) to 1")
    p.add_argument("out", type=path, metavar="OUT", help="the folder to write; every command takes it as a MODEL")
    p.add_argument("--ema", action="store_true", help="of B, the moving average of the weights that train.ema kept")
    p.set_defaults(flags={"A.weights": "A", "B.weights": "B", "B.ema": "--ema", "leave ema out": "leave --ema out"})


def _merge(args) -> None:
    for name in ("a", "b"):
        source = getattr(args, name)
        if not source or not source.startswith("hf-hub:") and not Path(source).is_dir():
            raise UserError(f"{name.upper()}: '{source}' is no folder of a run or model; give one, or hf-hub:ORG/NAME")
    from ..models.merging import merge

    first, second = settings.Model(weights=args.a), settings.Model(weights=args.b, ema=args.ema)
    print(merge(first, second, args.weight, args.out))
