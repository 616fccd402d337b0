"""Figures of robustness: clean against robust accuracy, and accuracy against the radius of the attack."""

from __future__ import annotations

import math

from ..config import parse_fraction
from . import style
from .curves import column
from .groups import Group, mean
from .records import Accuracy, Zeroshot
from .run_files import ReportSource
from .shown import short
from .style import Figure, file_name


def scatter(group: Group, number: int, sources: list[ReportSource]) -> list[Figure]:
    """Draw a figure for each radius: each model's datasets as small marks, their mean as a large one."""
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
                clean = [100 * d.clean_all.accuracy for d in measured]
                robust = [100 * d.eps[eps].robust.accuracy for d in measured]
                axes.plot(clean, robust, linestyle="", markersize=4, alpha=0.5, **style.marker(i))
            large = {"linestyle": "", "markersize": 10, "markeredgecolor": "black", **style.marker(i)}
            axes.plot(*means, label=style.label(sources[i].name), **large)
            said.append(f"{sources[i].name} {means[0]:.1f} % clean and {means[1]:.1f} % robust")
        edge = -0.03 * most  # so that a mark at 0 is seen whole
        axes.set(xlabel="clean accuracy, %", ylabel="robust accuracy, %", title=f"{short(group.norm)} {eps}")
        axes.set(xlim=(edge, most), ylim=(edge, most))
        axes.plot((0, most), (0, most), color="0.6", linewidth=0.8, linestyle=":")
        axes.legend(loc="upper left")
        alt = f"Clean against robust accuracy at {group.norm} {eps}, means over datasets: {'; '.join(said)}."
        return style.finish(f"scatter-{number}-{file_name(eps)}", alt, canvas)


def trajectory(sources: list[ReportSource]) -> Figure | None:
    """Draw clean against robust accuracy of the probe over training, from the hollow mark to the full one."""
    said = []
    with style.canvas() as canvas:
        axes = canvas.subplots()
        for i, source in enumerate(sources):
            rows = [row for row in source.probes if len(column([row], "clean")[0]) and len(column([row], "robust")[0])]
            if not rows:
                continue
            clean, robust = ([100 * row[kind] for row in rows] for kind in ("clean", "robust"))
            curve = {"markersize": 3, **style.line(i), "marker": style.marker(i)["marker"]}
            axes.plot(clean, robust, label=style.label(source.name), **curve)
            axes.plot(clean[0], robust[0], markersize=8, markerfacecolor="white", **style.marker(i))
            axes.plot(clean[-1], robust[-1], markersize=8, **style.marker(i))
            said.append(f"{source.name} from ({clean[0]:.1f}, {robust[0]:.1f}) to ({clean[-1]:.1f}, {robust[-1]:.1f})")
        if not said:
            return None
        axes.set(xlabel="clean accuracy of the probe, %", ylabel="robust accuracy of the probe, %")
        axes.set_title("over training")
        axes.legend()
        alt = f"Clean against robust accuracy of the probe over training: {'; '.join(said)}."
        caption = "From the hollow mark, the first probe, to the large full one, the last."
        return style.finish("scatter-training", alt, canvas, caption)


def against_eps(group: Group, number: int, sources: list[ReportSource]) -> list[Figure]:
    """Draw a figure for each dataset: accuracy over the radius, at 0 the clean accuracy of the attacked samples."""
    return [_against_eps(group, number, sources, name) for name in group.datasets]


def _against_eps(group: Group, number: int, sources: list[ReportSource], name: str) -> Figure:
    said, chance = [], 0.0
    unit = 255 if group.norm == "linf" else 1
    with style.canvas() as canvas:
        axes = canvas.subplots()
        for i, model in enumerate(group.models):
            if name not in model:
                continue
            points = radii(model[name])
            values = [100 * value.accuracy for _, value in points]
            look = {**style.line(i), "marker": style.marker(i)["marker"], "markersize": 4, "capsize": 2}
            axes.errorbar(
                [unit * eps for eps, _ in points],
                values,
                yerr=_bars([value for _, value in points]),
                label=style.label(sources[i].name),
                elinewidth=0.8,
                **look,
            )
            chance = 100 * model[name].chance
            said.append(f"{sources[i].name} {', '.join(f'{v:.1f} %' for v in values)}")
        axes.axhline(chance, color="0.4", linewidth=0.8, linestyle=":")
        small = {"ha": "right", "va": "bottom", "fontsize": 7, "color": "0.4"}
        axes.annotate("chance", (1, chance), xycoords=("axes fraction", "data"), **small)
        of = f"radius eps, {short(group.norm)}" + (", in 1/255" if unit == 255 else "")
        axes.set(xlabel=of, ylabel="accuracy, %", title=short(name), ylim=(0, 100))
        if len(said) > 1:
            axes.legend()
        alt = f"Accuracy on {name} against the radius of the attack, from 0: {'; '.join(said)}; chance {chance:.1f} %."
        return style.finish(f"eps-{number}-{file_name(name)}", alt, canvas)


def _bars(values: list[Accuracy]) -> list[list[float]]:
    """How far each 95 % interval reaches below and above its accuracy, in points."""
    return [[abs(100 * (value.interval95[side] - value.accuracy)) for value in values] for side in (0, 1)]


def radii(dataset: Zeroshot) -> list[tuple[float, Accuracy]]:
    """Return (radius, accuracy) ascending, the clean accuracy of the same samples first."""
    attacked = sorted((float(parse_fraction(eps)), at.robust) for eps, at in dataset.eps.items())
    return [(0.0, dataset.clean), *attacked]
