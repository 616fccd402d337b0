"""`mmtard bench scale`: what a step takes on more GPUs than there are, predicted; and on more ranks, measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .. import config as settings, resources
from ..benchmarks.out_file import check_out, scratch_folder
from ..config.argument_types import path, positive, separated
from ..errors import RunError, UserError
from ..launch import local
from .command import add_command, add_config_arguments, heavy_imports


def add(parts) -> None:
    """Add this part of `mmtard bench` to its parser."""
    p = add_command(
        parts,
        "scale",
        _run,
        "Predict a configuration's step on many GPUs, part by part, and say which part binds first.",
        "mmtard bench scale vitb32_mmtard --world 8,16,64 teachers.clean.arch=ViT-L-14 teachers.robust.arch=ViT-L-14\n"
        "         mmtard bench scale benchmarks/vitb32_vitl14 --weak 1,2",
        more="A prediction for A100s by stated assumptions, or from what bench train and bench data measured.",
    )
    add_config_arguments(p)
    what = p.add_mutually_exclusive_group()
    what.add_argument(
        "--world", type=separated(positive), default=[8, 16, 64], metavar="N,N", help="GPUs (default 8,16,64)"
    )
    what.add_argument(
        "--weak",
        type=separated(positive),
        metavar="N,N",
        help="instead, measure: the step on so many ranks of this machine, each with the configuration's whole batch",
    )
    p.add_argument("--train", type=path, metavar="FILE", help="of mmtard bench train --out, on one GPU of the cluster")
    p.add_argument("--data", type=path, metavar="FILE", help="of mmtard bench data --out, on a node of the cluster")
    p.add_argument(
        "--ranks", type=path, metavar="FILE", help="of mmtard bench scale --weak --out, on a node of the cluster"
    )
    p.add_argument("--out", type=path, default=Path("bench_scale.json"), metavar="FILE", help="(bench_scale.json)")


def _run(args) -> None:
    check_out(args.out)
    if args.weak:
        _check_flags(args)
    config = settings.load(args.config, args.overrides)
    if args.weak:
        measured = [_measured(args, config, world) for world in args.weak]
        with heavy_imports():
            from ..benchmarks.weak_scaling import report_weak_scaling
        return report_weak_scaling(config, dict(zip(args.weak, measured)), args.out)
    with heavy_imports():
        from ..benchmarks.scale import ScaleBenchmark
    return ScaleBenchmark(config, args.world, train=args.train, data=args.data, ranks=args.ranks).run(args.out)


def _check_flags(args) -> None:
    for flag in ("train", "data", "ranks"):
        if file := getattr(args, flag):
            raise UserError(f"--{flag}: '{file}' is read for a prediction, and --weak measures; leave one of them out")


def _measured(args, config: settings.Config, world: int) -> dict:
    """What `mmtard bench train` finds of `world` ranks here, a rank of which takes the configuration's batch."""
    with scratch_folder() as scratch:
        out = scratch / "train.json"
        batch = f"train.batch_size={world * config.train.batch_size}"
        lanes = f"data.lanes={world * config.train.batch_size}"
        words = (
            "bench",
            "train",
            str(args.config),
            *args.overrides,
            batch,
            lanes,
            "--variants",
            "mmtard",
            "--out",
            str(out),
        )
        status = local.run(sys.executable, words, resources.PACKAGE.parent, world)
        if status:
            raise RunError(f"bench train on {world} ranks ended with status {status}; its lines above say why", status)
        return json.loads(out.read_text(encoding="utf-8"))
