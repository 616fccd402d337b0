"""Figures of robustness: clean against robust accuracy, and accuracy against the radius of the attack."""

from __future__ import annotations

import math
import re

from ..config import parse_fraction
from . import style
from .curves import column
from .groups import Group, mean
from .records import Accuracy, Zeroshot
from .sources import ReportSource
from .style import Figure


def scatter(group: Group, number: int, sources: list[ReportSource]) -> list[Figure]:
    """A figure for each radius: each model's datasets as small marks, their mean as a large one."""
    highest = max((d.clean_all.accuracy for model in group.models for d in model.values()), default=0)
    most = min(100, 10 * math.ceil(10 * highest + 0.5))
    return [_scatter(group, number, sources, eps, most) for eps in group.eps]


def _scatter(group: Group, number: int, sources: list[ReportSource], eps: str, most: float) -> Figure:
    said = []
    with style.canvas() as canvas:
        axes = canvas.subplots()
        for i, model in enumerate(group.models):
            measured = [d for d in model.values() if eps in d.eps]
            if not measured:
                continue
            means = (100 * mean(measured, None), 100 * mean(measured, eps))
            if len(measured) > 1:
                clean, robust = (
                    [100 * v for v in values]
                    for values in zip(*((d.clean_all.accuracy, d.eps[eps].robust.accuracy) for d in measured))
                )
                axes.plot(clean, robust, linestyle="", markersize=4, alpha=0.5, **style.marker(i))
            axes.plot(
                *means, linestyle="", markersize=10, label=sources[i].name, markeredgecolor="black", **style.marker(i)
            )
            said.append(f"{sources[i].name} {means[0]:.1f} % clean and {means[1]:.1f} % robust")
        edge = -0.03 * most  # so that a mark at 0 is seen whole
        axes.set(
            xlabel="clean accuracy, %",
            ylabel="robust accuracy, %",
            title=f"{group.norm} {eps}",
            xlim=(edge, most),
            ylim=(edge, most),
        )
        axes.plot((0, most), (0, most), color="0.6", linewidth=0.8, linestyle=":")
        axes.legend(loc="upper left")
        alt = f"Clean against robust accuracy at {group.norm} {eps}, means over datasets: {'; '.join(said)}."
        return Figure(f"scatter-{number}-{_file(eps)}", alt, style.png(canvas))


def trajectory(sources: list[ReportSource]) -> Figure | None:
    """Clean against robust accuracy of the probe over training, from the hollow mark to the full one."""
    said = []
    with style.canvas() as canvas:
        axes = canvas.subplots()
        for i, source in enumerate(sources):
            rows = [row for row in source.probes if len(column([row], "clean")[0]) and len(column([row], "robust")[0])]
            if not rows:
                continue
            clean, robust = ([100 * row[kind] for row in rows] for kind in ("clean", "robust"))
            axes.plot(clean, robust, label=source.name, markersize=3, **style.line(i), marker=style.marker(i)["marker"])
            axes.plot(clean[0], robust[0], markersize=8, markerfacecolor="white", **style.marker(i))
            axes.plot(clean[-1], robust[-1], markersize=8, **style.marker(i))
            said.append(f"{source.name} from ({clean[0]:.1f}, {robust[0]:.1f}) to ({clean[-1]:.1f}, {robust[-1]:.1f})")
        if not said:
            return None
        axes.set(
            xlabel="clean accuracy of the probe, %", ylabel="robust accuracy of the probe, %", title="over training"
        )
        axes.legend()
        alt = f"Clean against robust accuracy of the probe over training: {'; '.join(said)}."
        return Figure(
            "scatter-training",
            alt,
            style.png(canvas),
            "From the hollow mark, the first probe, to the large full one, the last.",
        )


def against_eps(group: Group, number: int, sources: list[ReportSource]) -> list[Figure]:
    """A figure for each dataset: accuracy over the radius, from the clean accuracy of the attacked samples at radius 0."""
    return [_against_eps(group, number, sources, name) for name in group.datasets]


def _against_eps(group: Group, number: int, sources: list[ReportSource], name: str) -> Figure:
    said = []
    unit = 255 if group.norm == "linf" else 1
    with style.canvas() as canvas:
        axes = canvas.subplots()
        for i, model in enumerate(group.models):
            if name not in model:
                continue
            points = radii(model[name])
            values = [100 * value.accuracy for _, value in points]
            bars = [
                [abs(100 * bound - v) for (_, a), v in zip(points, values) for bound in (a.interval95[side],)]
                for side in (0, 1)
            ]
            look = {
                **style.line(i),
                "marker": style.marker(i)["marker"],
                "markersize": 4,
                "capsize": 2,
                "elinewidth": 0.8,
            }
            axes.errorbar([unit * eps for eps, _ in points], values, yerr=bars, label=sources[i].name, **look)
            chance = 100 * model[name].chance
            said.append(f"{sources[i].name} {', '.join(f'{v:.1f} %' for v in values)}")
        axes.axhline(chance, color="0.4", linewidth=0.8, linestyle=":")
        axes.annotate(
            "chance", (1, chance), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7, color="0.4"
        )
        axes.set(
            xlabel=f"radius eps, {group.norm}" + (", in 1/255" if unit == 255 else ""),
            ylabel="accuracy, %",
            title=name,
            ylim=(0, 100),
        )
        if len(said) > 1:
            axes.legend()
        alt = f"Accuracy on {name} against the radius of the attack, from 0: {'; '.join(said)}; chance {chance:.1f} %."
        return Figure(f"eps-{number}-{_file(name)}", alt, style.png(canvas))


def radii(dataset: Zeroshot) -> list[tuple[float, Accuracy]]:
    """(radius, accuracy) ascending, the clean accuracy of the same samples first."""
    attacked = sorted((float(parse_fraction(eps)), at.robust) for eps, at in dataset.eps.items())
    return [(0.0, dataset.clean), *attacked]


def _file(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-").lower()
