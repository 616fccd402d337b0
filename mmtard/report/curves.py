"""Figures of training: loss terms, teacher weights, probes, optimisation, speed and memory, every run in one colour."""

from __future__ import annotations

import re

import numpy as np

from ..evaluation.statistics import wilson_interval
from . import style
from .run_files import ReportSource
from .shown import short
from .style import Figure, file_name

# What else stands in a row of metrics.jsonl: these are no terms of the loss.
OPTIMISATION = {"lr": "learning rate", "grad_norm": "gradient norm"}
SPEED = {
    "images_per_s": "images/s, all ranks",
    "seconds": "seconds a step",
    "tflops_a_rank": "TFLOP/s a rank",
    "mfu": "share of the device's peak",
    "memory_gib": "memory, GiB, first rank",
    "reserved_gib": "memory held for it, GiB, first rank",
}
COUNTS = ("step", "batch", "skipped", "replaced")
WEIGHT, QUANTILE = "w_", re.compile(r"(?P<of>w_.+?)_[pq](?P<percent>\d{1,2})$")
SPREAD = re.compile(r"_p\d\d$")  # quantiles, beside the mean of the same column
LARGEST = 1e300  # what is greater cannot be drawn; NaN and infinities are no numbers here either
POINTS = 300  # a longer run is averaged over that many equal parts


def losses(sources: list[ReportSource]) -> list[Figure]:
    """Draw a figure for each column that no other figure shows: the loss first, then its terms by name."""
    known = {*OPTIMISATION, *SPEED, *COUNTS}
    terms = {
        name
        for source in sources
        for row in source.metrics
        for name in row
        if name not in known and not name.startswith(WEIGHT) and not SPREAD.search(name)
    }
    ordered = sorted(terms, key=lambda name: (name != "loss", name))
    return [figure for name in ordered if (figure := _column(sources, name, name))]


def optimisation(sources: list[ReportSource]) -> list[Figure]:
    """Draw learning rate and gradient norm over the steps."""
    return [figure for name, label in OPTIMISATION.items() if (figure := _column(sources, name, label))]


def speed(sources: list[ReportSource]) -> list[Figure]:
    """Draw throughput and memory over the steps."""
    return [figure for name, label in SPEED.items() if (figure := _column(sources, name, label, from_zero=True))]


def _column(sources: list[ReportSource], name: str, label: str, from_zero: bool = False) -> Figure | None:
    said = []
    with style.canvas() as canvas:
        axes = canvas.subplots()
        for i, source in enumerate(sources):
            steps, values = column(source.metrics, name)
            if len(steps):
                _line(axes, steps, values, style.label(source.name), style.line(i))
                said.append(f"{source.name} from {values[0]:.4g} to {values[-1]:.4g}")
        if not said:
            return None
        axes.set(xlabel="step", ylabel=style.label(label), title=short(name))
        if from_zero:
            axes.set_ylim(0, 1.1 * axes.dataLim.ymax or 1)
        if len(said) > 1:
            axes.legend()
        alt = f"{label} over the training steps: {'; '.join(said)}."
        return style.finish(f"training-{file_name(name)}", alt, canvas)


def _line(axes, steps, values, name: str, look: dict) -> None:
    """A curve; of a long run the means of equal parts, in the band of each part's least and greatest."""
    if len(steps) > POINTS:
        parts = [np.array(part) for part in np.array_split(np.stack([steps, values]), POINTS, axis=1)]
        axes.fill_between(
            [p[0].mean() for p in parts],
            [p[1].min() for p in parts],
            [p[1].max() for p in parts],
            color=look["color"],
            alpha=0.2,
            linewidth=0,
        )
        steps, values = (np.array([p[row].mean() for p in parts]) for row in (0, 1))
    axes.plot(steps, values, label=name, **look, **({"marker": "."} if len(steps) == 1 else {}))


def column(rows: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (steps, values) of the rows that have a finite number there."""
    pairs = [(row["step"], row[name]) for row in rows if _number(row.get(name))]
    steps, values = zip(*pairs) if pairs else ((), ())
    return np.array(steps, dtype=float), np.array(values, dtype=float)


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and -LARGEST <= value <= LARGEST


def teacher_weights(sources: list[ReportSource]) -> list[Figure]:
    """Draw a figure for each run whose samples weight their teachers: means over the batch.

    Where the run stored quantiles of the batch, a band shows their range.
    """
    return [figure for source in sources if (figure := _weights(source))]


def _weight_columns(rows: list[dict]) -> tuple[list[str], dict[str, dict[int, str]]]:
    """(columns of means, {column: {percent: column of that quantile}})."""
    names = sorted({name for row in rows for name in row if name.startswith(WEIGHT)})
    quantiles: dict[str, dict[int, str]] = {}
    for name in names:
        if match := QUANTILE.match(name):
            quantiles.setdefault(match["of"], {})[int(match["percent"])] = name
    return [name for name in names if not QUANTILE.match(name)], quantiles


def _weights(source: ReportSource) -> Figure | None:
    means, quantiles = _weight_columns(source.metrics)
    if not means:
        return None
    said = []
    with style.canvas() as canvas:
        axes = canvas.subplots()
        for i, name in enumerate(means):
            steps, values = column(source.metrics, name)
            if not len(steps):
                continue
            teacher, stored = name.removeprefix(WEIGHT), quantiles.get(name, {})
            _line(axes, steps, values, style.label(teacher), style.line(i))
            said.append(f"{teacher} from {values[0]:.4g} to {values[-1]:.4g}")
            if len(stored) > 1:
                (below, low), (above, high) = (column(source.metrics, stored[q]) for q in (min(stored), max(stored)))
                if len(below) and len(above):
                    _band(axes, below, low, np.interp(below, above, high), i)
        if not said:
            return None
        axes.set(xlabel="step", ylabel="weight, mean over the batch")
        axes.set_title(f"teacher weights, {short(source.name, 24)}")
        axes.legend()
        shown = sorted({q for stored in quantiles.values() for q in stored})
        band = f"Bands: from the {shown[0]}th to the {shown[-1]}th percentile of the batch." if len(shown) > 1 else ""
        alt = f"Weights of the teachers of {source.name} over the training steps: {'; '.join(said)}."
        return style.finish(f"weights-{file_name(source.name)}", alt, canvas, band)


def _band(axes, steps, low, high, i: int) -> None:
    axes.fill_between(steps, low, high, color=style.line(i)["color"], alpha=0.15, linewidth=0)


def probes(sources: list[ReportSource]) -> list[Figure]:
    """Draw clean and robust accuracy on the fixed probe samples during training, in their 95 % interval."""
    return [figure for kind in ("clean", "robust") if (figure := _probe(sources, kind))]


def _probe(sources: list[ReportSource], kind: str) -> Figure | None:
    said = []
    with style.canvas() as canvas:
        axes = canvas.subplots()
        for i, source in enumerate(sources):
            rows = [row for row in source.probes if _number(row.get(kind))]
            if not rows:
                continue
            steps, values = column(rows, kind)
            counts = [row["n"] for row in rows]
            bounds = 100 * np.array([wilson_interval(round(v * n), n) for v, n in zip(values, counts)])
            look = {**style.line(i), "marker": style.marker(i)["marker"], "markersize": 4}
            axes.plot(steps, 100 * values, label=style.label(source.name), **look)
            _band(axes, steps, bounds[:, 0], bounds[:, 1], i)
            said.append(f"{source.name} from {100 * values[0]:.1f} to {100 * values[-1]:.1f} % on {counts[-1]} samples")
        if not said:
            return None
        axes.set(xlabel="step", ylabel="accuracy, %", title=f"{kind} accuracy of the probe")
        axes.set_ylim(0, 100)
        if len(said) > 1:
            axes.legend()
        alt = f"{kind.capitalize()} accuracy on the probe samples over the training steps: {'; '.join(said)}."
        return style.finish(f"probe-{kind}", alt, canvas, "Band: 95 % interval.")
