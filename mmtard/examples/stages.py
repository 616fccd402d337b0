"""The stages of a job that trains several runs on this machine and compares them: titles, trainings, numbers."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from .. import resources
from ..config import load
from ..errors import RunError, UserError
from ..launch import local

console = Console(highlight=False, soft_wrap=True)


def main(name: str, work: Callable[[], None], root: Path) -> int:
    """Do the work and say how long it took; return the exit status, that of the error which ended it or 0."""
    began = time.monotonic()
    try:
        work()
    except (UserError, RunError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return getattr(error, "status", 2)
    seconds = time.monotonic() - began
    console.print(f"{seconds:.0f} s. The runs are in {root}; their curves: tensorboard --logdir {root}", markup=False)
    return 0


def configuration(folder: str, name: str) -> Path:
    """The path of configs/FOLDER/NAME.yaml of this installation; as seen from here where it lies below."""
    path = resources.folder("configs") / folder / f"{name}.yaml"
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def title(i: int, n: int, text: str) -> None:
    """Announce stage `i` of `n`."""
    console.print(f"[bold]\\[{i}/{n}] {escape(text)}[/bold]")


def train(config: Path, *settings: str) -> None:
    """Train, or go on training, the run of a configuration on 2 ranks, or on the one GPU there is.

    Raises RunError with the training's status unless it completes.
    """
    ranks = 2 if load(config, settings).engine.device == "cpu" else min(2, torch.cuda.device_count() or 2)
    words = ("train", str(config), *settings)
    console.print(
        f"$ torchrun --standalone --nproc_per_node {ranks} -m mmtard {' '.join(words)}", style="dim", markup=False
    )
    os.environ["OMP_NUM_THREADS"] = "1"  # of the ranks: more would share these cores
    # The same without torchrun, which would import torch itself before any rank may begin to.
    status = local.run(sys.executable, words, resources.PACKAGE.parent, ranks)
    if status:
        raise RunError(
            f"training {config} ended with status {status}; its lines above say why. "
            "The same command goes on from here",
            status,
        )


def cell(accuracy: dict) -> str:
    """`44.9 (42-48)`: an accuracy of the results and its 95 % interval, in %."""
    low, high = accuracy["interval95"]
    return f"{100 * accuracy['accuracy']:.1f} ({100 * low:.0f}-{100 * high:.0f})"
