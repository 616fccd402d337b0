"""Objectives side by side on CIFAR-10: two CLIPs, teachers, then every student at an equal budget, all measured."""

from __future__ import annotations

import argparse
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..config import Model, load, show_pixels
from ..distributed.processes import exit_process
from ..distributed.ranks import start, stop
from ..evaluation import datasets
from ..evaluation.evaluate import evaluate
from ..evaluation.protocols import PROTOCOLS
from ..evaluation.request import EvaluationRequest
from .cifar10_shards import make_shards
from .pretrain import PROMPT, Pretraining, pretrain
from .stages import cell, configuration, console, main, title, train

ROOT = Path("runs/cifar10")
TEACHERS = ("clean_teacher", "robust_teacher")
STUDENTS = ("tecoa", "fare", "rslad", "ard", "mtard", "mmtard")
EPS = Fraction(4, 255)
PROTOCOL = replace(PROTOCOLS["quick"], eps=(EPS,), n_samples=1000, templates=(PROMPT,))
PRETRAINING = {"student": 500, "teacher": 400}  # steps of 256 images


def compare(argv: list[str] | None = None) -> int:
    """Run what is not done yet and print the table; return the exit status."""
    p = argparse.ArgumentParser(prog="python -m mmtard.examples.cifar10", description=__doc__)
    p.add_argument(
        "source",
        type=Path,
        metavar="CIFAR10",
        help="folder with train/ and test/ images, one sub-folder a class, or with *train*.npz and *test*.npz",
    )
    p.add_argument("settings", nargs="*", metavar="key=value", help="settings of every training, e.g. train.steps=100")
    args = p.parse_args(argv)
    return main("comparison", lambda: _run(args.source, args.settings), ROOT)


def _run(source: Path, settings: list[str]) -> None:
    configurations = [configuration("cifar10", name) for name in (*TEACHERS, *STUDENTS)]
    for config in configurations:
        load(config, settings)  # what does not fit is told before hours of work
    stages = 2 + len(configurations) + 1
    title(1, stages, "CIFAR-10 as shards")
    make_shards(source, ROOT / "data")
    title(2, stages, "pretraining a small and a larger CLIP")
    for name, steps in PRETRAINING.items():
        how = Pretraining(Path(__file__).with_name(f"cifar10-{name}.json"), steps)
        pretrain(ROOT / "data", ROOT / "clip" / name, how, splits=("test",))
    for i, config in enumerate(configurations, 3):
        title(i, stages, f"training {config.stem}")
        train(config, *settings)
    title(stages, stages, f"measuring {PROTOCOL.n_samples} test images, eps {show_pixels(EPS)}")
    _table(_measure())


def _measure() -> dict[str, dict]:
    """{model: its part of the results}; what is measured already is taken over."""
    ranks = start()
    sources, measured = datasets.find_datasets(str(ROOT / "data" / "test")), {}
    models = {"start": ROOT / STUDENTS[0] / "start", **{name: ROOT / name for name in (*TEACHERS, *STUDENTS)}}
    for name, model in models.items():
        request = EvaluationRequest(
            Model(weights=str(model)), sources, PROTOCOL, ROOT / "results" / name, batch_size=100
        )
        (measured[name],) = evaluate(request, ranks, console.print)["datasets"]
    stop()
    return measured


def _table(measured: dict[str, dict]) -> None:
    of = f"eps {show_pixels(EPS)}, an attack on what the ones before it left"
    table = Table(title=f"CIFAR-10, accuracy in % (95 % interval), {of}")
    for i, column in enumerate(("model", "clean", *PROTOCOL.attacks)):
        table.add_column(column, justify="right" if i else "left")
    for name, result in measured.items():
        under = result["eps"][show_pixels(EPS)]["attacks"]
        table.add_row(name, cell(result["clean_all"]), *(cell(under[attack]) for attack in PROTOCOL.attacks))
    Console(width=max(100, console.width)).print(table)


if __name__ == "__main__":
    exit_process(compare())
