"""`mmtard bench train`: the training step, phase by phase, beside the published one."""

from __future__ import annotations

from pathlib import Path

from .. import config as settings
from ..benchmarks.out_file import check_out, check_trace
from ..config.argument_types import natural, path, positive
from ..distributed.launcher import choose_accelerator
from ..errors import UserError
from .command import add_command, add_config_arguments, heavy_imports


def add(parts) -> None:
    """Add this part of `mmtard bench` to its parser."""
    p = add_command(
        parts,
        "train",
        _run,
        "Time the training step of a configuration: each of its phases, what each of its options buys, and what "
        "loading, logging and checkpoints add.",
        "mmtard bench train benchmarks/vitb32_vitl14 --against published",
        more="Random images and classes stay on the device; no data is needed, and loading is timed where there is "
        "some. Variants run alternately, in one process. A checkpoint is written to $TMPDIR and removed.",
    )
    add_config_arguments(p)
    p.add_argument(
        "--against",
        choices=("published",),
        help="also time the published MMT-ARD step in plain PyTorch, and a lean loop, on the same models and attack",
    )
    p.add_argument("--steps", type=positive, default=1, metavar="N", help="steps of a variant in a round (default 1)")
    p.add_argument("--rounds", type=positive, default=3, metavar="N", help="rounds over all variants (default 3)")
    p.add_argument("--warm-up", type=natural, default=1, metavar="N", help="runs of each before the first round (1)")
    p.add_argument("--classes", type=positive, default=1000, metavar="N", help="classes of the heads (default 1000)")
    p.add_argument(
        "--variants",
        action="extend",
        nargs="+",
        metavar="NAME",
        help="these alone, by the names in the table; default: all that the configuration has",
    )
    p.add_argument("--trace", type=path, metavar="FILE", help="write a profile of one step, for chrome://tracing")
    p.add_argument("--out", type=path, default=Path("bench_train.json"), metavar="FILE", help="(bench_train.json)")


def _run(args) -> None:
    for setting in [name for name in args.variants or () if "=" in name][:1]:
        raise UserError(f"--variants: '{setting}' is a setting, and no name; settings come before --variants")
    check_out(args.out)  # which makes its folder
    check_trace(args.trace)
    config = settings.load(args.config, args.overrides)
    choose_accelerator(config.engine.device)
    with heavy_imports():
        from ..benchmarks.training import TrainingBenchmark
    TrainingBenchmark(
        config,
        against=args.against,
        steps=args.steps,
        rounds=args.rounds,
        warm_up=args.warm_up,
        classes=args.classes,
        variants=args.variants,
        trace=args.trace,
    ).run(args.out)
