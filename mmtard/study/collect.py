"""What the runs of a study came to: every sample's outcome, accuracy on the way, seconds, images, FLOPs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import show_pixels
from ..errors import UserError
from ..evaluation.results import damage_named, read
from ..files import read_json_lines
from ..runs import history
from ..runs.journal import missing
from ..runs.layout import EVENTS, METRICS, OVERFITTED
from .measures import Measurement

KINDS = ("clean", "robust")
LARGEST = 1e15  # of a metric: seconds, images/s, TFLOP/s


@dataclass(frozen=True)
class Outcome:
    """One evaluation of one model: which of the samples it is right on, clean and under attack. [N] bool each."""

    ids: tuple[int, ...]
    clean: np.ndarray
    robust: np.ndarray
    chance: float
    fingerprint: str = ""  # of the data
    failed: tuple[str, ...] = ()  # checks of health

    def flags(self, kind: str) -> np.ndarray:
        """Which samples it is right on, bool [N]. kind: clean or robust."""
        return self.clean if kind == "clean" else self.robust

    def accuracy(self, kind: str) -> float:
        """The share of samples it is right on. kind: clean or robust."""
        return float(self.flags(kind).mean())


@dataclass(frozen=True)
class Cost:
    """Of a training. seconds: of all its steps; by_step: until each of them; NaN from the first step that is missing
    in its metrics on. gflop: of one image, the mean over the steps, NaN if unknown.

    stored: seconds that it took, once, to store the teachers' embeddings which the method reads; in none of the others;
    None where it reads some that another process than the study's stored.
    """

    seconds: float
    by_step: dict[int, float]
    images: int
    gflop: float
    stored: float | None = 0.0


def outcome(one: Measurement) -> Outcome | None:
    """What an evaluation found; None where it is missing. Raises UserError for a damaged file."""
    if not one.done:
        return None
    results = read(one.out)
    with damage_named(one.out):
        entry = results["datasets"][0]
        samples = entry["samples"]
        robust = samples["eps"][show_pixels(one.measure.eps)]["robust"]
        clean, ids = np.array(samples["clean"], dtype=bool), tuple(samples["ids"])
        if not len(clean) == len(robust) == len(ids) > 0:
            raise ValueError("samples of other numbers")
        failed = tuple(f"{line['check']} ({line['detail']})" for line in entry["health"] if line["status"] == "FAIL")
        return Outcome(ids, clean, np.array(robust, dtype=bool), float(entry["chance"]), entry["fingerprint"], failed)


def same_samples(outcomes: dict[str, Outcome]) -> None:
    """Raise UserError where two models of one evaluation were measured on other samples."""
    first = next(iter(outcomes.items()), None)
    for name, one in outcomes.items():
        if (one.fingerprint, one.ids) != (first[1].fingerprint, first[1].ids):
            raise UserError(
                f"'{first[0]}' and '{name}' were measured on other samples, so that no difference can be paired; "
                "remove the evaluations of both, and start the study again"
            )


def cost(run: Path, steps: int, batch_size: int, stored: float | None = 0.0) -> Cost:
    """What a training of so many steps took, by its own metrics; a step that was lost and done again counts once.

    A crash of the machine may have taken the rows of some steps: their seconds are not known, their images are.
    """
    rows = [row for row in read_json_lines(run / METRICS) if type(row.get("step")) is int]
    gaps = missing((row["step"] for row in rows), steps)
    total, by_step = 0.0, {}
    for row in rows:
        total += _number(row, "seconds") if not gaps or row["step"] < gaps[0][0] else math.nan
        by_step[row["step"]] = total
    starts = history.read(run)
    world = int(_number(starts[-1], "world_size")) if starts else 1
    # TFLOP/s a rank * ranks / (images/s) is TFLOP an image, whatever the speed was.
    flop = [
        1e3 * _number(row, "tflops_a_rank") * max(1, world) / _number(row, "images_per_s")
        for row in rows
        if _number(row, "tflops_a_rank") and _number(row, "images_per_s")
    ]
    return Cost(
        math.nan if gaps else total,
        by_step,
        steps * batch_size,
        float(np.mean(flop)) if flop else float("nan"),
        stored,
    )


def alarms(run: Path) -> list[str]:
    """What a training's alarm for catastrophic overfitting said, each in words."""
    told = []
    for row in read_json_lines(run / EVENTS):
        if row.get("event") == OVERFITTED:
            more = row.get("attack_steps_from_now_on")
            told.append(f"at step {row.get('step')}" + (f", {more} attack steps from then on" if more else ""))
    return told


def _number(row: dict, key: str) -> float:
    """A number of a row that may be damaged; 0 where it is none, negative, or beyond all bounds."""
    value = row.get(key)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and 0 <= value < LARGEST else 0.0
