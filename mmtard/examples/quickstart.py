"""The main job from nothing: renders images, pretrains a tiny CLIP, trains teachers, distils, compares, reports.

`python -m mmtard.examples.quickstart` works below the current folder and skips what is done.
"""

from __future__ import annotations

import shlex
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..config import Model, show_pixels
from ..distributed.processes import exit_process
from ..distributed.ranks import start, stop
from ..evaluation import datasets
from ..evaluation.evaluate import evaluate
from ..evaluation.protocols import PROTOCOLS
from ..evaluation.request import EvaluationRequest
from ..report.page import report
from .pretrain import PROMPT, pretrain
from .shapes import make_data
from .stages import cell, configuration, console, main, title, train

ROOT = Path("runs/quickstart")
EPS = Fraction(6, 255)
TRAINED = ("clean_teacher", "robust_teacher", "single_teacher", "mmtard")
COMPARED = {
    "start": ROOT / "mmtard" / "start",
    "one teacher (ARD)": ROOT / "single_teacher",
    "MMT-ARD": ROOT / "mmtard",
}
PROTOCOL = replace(PROTOCOLS["quick"], attacks=("pgd",), eps=(EPS,), n_samples=None, templates=(PROMPT,))
SPLITS = {"": "test", "zero-shot ": "zeroshot"}


def _run() -> None:
    stages = 3 + len(TRAINED)
    configurations = [configuration("quickstart", name) for name in TRAINED]  # told now where they are not installed
    title(1, stages, "rendering captioned images")
    make_data(ROOT / "shapes")
    title(2, stages, "pretraining a tiny CLIP on the captions")
    pretrain(ROOT / "shapes", ROOT / "clip")
    for i, config in enumerate(configurations, 3):
        title(i, stages, f"training {config.stem} on 2 ranks")
        train(config)
    title(stages, stages, f"measuring, PGD-20 at eps {show_pixels(EPS)}")
    _table(_measure())
    _report()


def _measure() -> dict[str, dict[str, dict]]:
    """{model: {split: its part of the results}}; what is measured already is taken over."""
    ranks = start("cpu")
    sources = [source for split in SPLITS.values() for source in datasets.find_datasets(str(ROOT / "shapes" / split))]
    measured = {}
    for name, model in COMPARED.items():
        out = ROOT / "results" / f"{model.parent.name}-{model.name}"
        request = EvaluationRequest(Model(weights=str(model)), sources, PROTOCOL, out, batch_size=128)
        results = evaluate(request, ranks, console.print)
        measured[name] = dict(zip(SPLITS.values(), results["datasets"]))
    stop()
    return measured


def _table(measured: dict[str, dict[str, dict]]) -> None:
    table = Table(title=f"accuracy in % (95 % interval), eps {show_pixels(EPS)}")
    table.add_column("model")
    for prefix in SPLITS:
        table.add_column(f"{prefix}clean", justify="right")
        table.add_column(f"{prefix}robust" if prefix else "PGD-20", justify="right")
    for name, by_split in measured.items():
        cells = []
        for split in SPLITS.values():
            for found in (by_split[split]["clean"], by_split[split]["eps"][show_pixels(EPS)]["robust"]):
                cells.append(cell(found))
        table.add_row(name, *cells)
    Console(width=max(100, console.width)).print(table)
    chance = ", ".join(f"{split} {100 * measured['start'][split]['chance']:.1f}" for split in SPLITS.values())
    console.print(
        f"chance level: {chance}. The zero-shot classes are colour-shape combinations that no training image shows."
    )


def _report() -> None:
    """Write the page of the runs and the student's start, and say where it lies."""
    teachers = {name: ROOT / name for name in TRAINED if ROOT / name not in COMPARED.values()}
    shown = COMPARED | teachers
    words = [str(path) for path in shown.values()]
    command = shlex.join(["mmtard", "report", *words, "--labels", *shown, "--out", str(ROOT / "report")])
    page = report(list(shown.values()), ROOT / "report", command=command, labels=list(shown))
    console.print(f"Look at it in a browser: {page.resolve().as_uri()}", markup=False)


if __name__ == "__main__":
    exit_process(main("quickstart", _run, ROOT))
