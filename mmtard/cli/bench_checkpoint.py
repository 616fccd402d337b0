"""`mmtard bench checkpoint`: how long the training stands still for a checkpoint."""

from __future__ import annotations

from pathlib import Path

from .. import config as settings
from ..benchmarks.out_file import check_out
from ..config.argument_types import path, positive
from ..distributed.launcher import choose_accelerator
from .command import add_command, add_config_arguments, heavy_imports


def add(parts) -> None:
    """Add this part of `mmtard bench` to its parser."""
    p = add_command(
        parts,
        "checkpoint",
        _run,
        "Time a checkpoint of a configuration's student: the copy that the loop waits for, and the write behind it.",
        "mmtard bench checkpoint benchmarks/vitb32_vitl14\n"
        "         mmtard bench checkpoint benchmarks/vitb32_vitl14 student.arch=ViT-L-14 --folder /scratch",
    )
    add_config_arguments(p)
    p.add_argument("--rounds", type=positive, default=3, metavar="N", help="checkpoints (default 3)")
    p.add_argument(
        "--folder", type=path, metavar="DIR", help="of the disk to write to (default: that of scratch files)"
    )
    p.add_argument(
        "--out", type=path, default=Path("bench_checkpoint.json"), metavar="FILE", help="(bench_checkpoint.json)"
    )


def _run(args) -> None:
    check_out(args.out)
    config = settings.load(args.config, args.overrides)
    choose_accelerator(config.engine.device)
    with heavy_imports():
        from ..benchmarks.checkpoint import CheckpointBenchmark
    CheckpointBenchmark(config, rounds=args.rounds, folder=args.folder).run(args.out)
