"""Weak scaling, measured: the training step on more ranks of this machine, the same work a rank."""

from __future__ import annotations

from pathlib import Path

import torch

from ..config import Config
from .report import BenchmarkReport, BenchmarkTable
from .timing import Spread


def report_weak_scaling(config: Config, found: dict[int, dict], out: Path) -> None:
    """Print and write what `mmtard bench train` found, by the number of ranks; the first is what others are held to."""
    seconds = {world: content["variants"]["mmtard"]["seconds"] for world, content in found.items()}
    communication = {world: content["variants"]["mmtard"]["communication"] for world, content in found.items()}
    base = Spread.of(next(iter(seconds.values()))).median
    table = BenchmarkTable(
        f"Weak scaling on this machine: {config.train.batch_size} images a rank",
        ["ranks", "s a step", "images/s", "time of the first by this", "s in collectives"],
    )
    for world, of_world in seconds.items():
        spread = Spread.of(of_world)
        images = world * config.train.batch_size / spread.median
        share, collectives = f"{100 * base / spread.median:.0f} %", Spread.of(communication[world])
        table.rows.append([str(world), str(spread), f"{images:.4g}", share, str(collectives)])
    note = "Ranks share this machine's cores and memory: give each OMP_NUM_THREADS=1 and a core of its own to compare."
    numbers = {"config": config.model_dump(mode="json"), "seconds": seconds, "communication": communication}
    BenchmarkReport([table], numbers, [note]).publish(out, torch.device("cpu"))
