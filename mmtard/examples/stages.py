"""The stages of a job that trains several runs on this machine and compares them: their titles, their trainings, their numbers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from ..config import load
from ..errors import RunError, UserError

console = Console(highlight=False, soft_wrap=True)


def main(name: str, work: Callable[[], None], root: Path) -> int:
    """Do the work and say how long it took; the exit status: 0, or that of the error which ended it, told as one line."""
    began = time.monotonic()
    try:
        work()
    except (UserError, RunError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return getattr(error, "status", 2)
    console.print(
        f"{time.monotonic() - began:.0f} s. The runs are in {root}; look at them with: tensorboard --logdir {root}"
    )
    return 0


def title(i: int, n: int, text: str) -> None:
    """Announce stage `i` of `n`."""
    console.print(f"[bold]\\[{i}/{n}] {text}[/bold]")


def train(config: Path, *settings: str) -> None:
    """Train, or go on training, the run of a configuration on 2 ranks, or on the one GPU there is.

    Raises RunError with the training's status unless it completes.
    """
    ranks = 2 if load(config, settings).engine.device == "cpu" else min(2, torch.cuda.device_count() or 2)
    command = [
        "torchrun",
        "--standalone",
        "--nproc_per_node",
        str(ranks),
        "-m",
        "mmtard",
        "train",
        str(config),
        *settings,
    ]
    console.print(f"$ {' '.join(command)}", style="dim")
    as_module = [sys.executable, "-m", "torch.distributed.run", *command[1:]]
    status = subprocess.run(as_module, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
    if status:
        raise RunError(
            f"training {config} ended with status {status}; its lines above say why. The same command goes on from here",
            status,
        )


def cell(accuracy: dict) -> str:
    """`44.9 (42-48)`: an accuracy of the results and its 95 % interval, in %."""
    low, high = accuracy["interval95"]
    return f"{100 * accuracy['accuracy']:.1f} ({100 * low:.0f}-{100 * high:.0f})"
