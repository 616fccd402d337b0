"""`mmtard bench data`: how fast shards are read, and whether the training waits for them."""

from __future__ import annotations

from pathlib import Path

from .. import config as settings
from ..benchmarks.out_file import check_out
from ..config.argument_types import jpeg_quality, natural, path, positive
from ..distributed.launcher import choose_accelerator
from .command import add_command, add_config_arguments, heavy_imports


def add(parts) -> None:
    """Add this part of `mmtard bench` to its parser."""
    p = add_command(
        parts,
        "data",
        _run,
        "Time the reading of a configuration's shards on one core, as stored and pre-resized, and the loop's wait.",
        "mmtard bench data configs/vitb32_mmtard.yaml data.shards=shards/train\n"
        "         mmtard bench data benchmarks/vitb32_vitl14 --drawn 1024 --steps 3",
        more="The step is the training's own, with random classes; `mmtard shards --resize` writes pre-resized shards.",
    )
    add_config_arguments(p)
    p.add_argument("--drawn", type=positive, metavar="N", help="draw N images of 500x375, in place of data.shards")
    p.add_argument("--images", type=positive, default=256, metavar="N", help="read in a round (default 256)")
    p.add_argument("--rounds", type=positive, default=3, metavar="N", help="rounds over both kinds (default 3)")
    p.add_argument("--resize", type=positive, default=256, metavar="PX", help="of pre-resized shards (default 256)")
    p.add_argument("--quality", type=jpeg_quality, default=90, metavar="Q", help="of their JPEG (default 90)")
    p.add_argument("--steps", type=natural, default=10, metavar="N", help="of the loop; 0: leave it out (default 10)")
    p.add_argument("--out", type=path, default=Path("bench_data.json"), metavar="FILE", help="(bench_data.json)")


def _run(args) -> None:
    check_out(args.out)
    config = settings.load(args.config, args.overrides)
    choose_accelerator(config.engine.device)
    with heavy_imports():
        from ..benchmarks.data import DataBenchmark
    DataBenchmark(
        config,
        drawn=args.drawn,
        images=args.images,
        rounds=args.rounds,
        resize=args.resize,
        quality=args.quality,
        steps=args.steps,
    ).run(args.out)
