"""The figures of a study: fronts, and robust accuracy over seconds and images."""

from __future__ import annotations

import numpy as np

from ..report import style
from ..report.style import Figure, file_name
from .findings import Findings
from .front import staircase

LEAST = 0.5  # points: the smallest spread over seeds that is drawn


def fronts(found: Findings) -> list[Figure]:
    """Draw clean against robust accuracy of every setting, a figure an evaluation; lines join what dominates."""
    return [_front(found, name) for name in found.study.evaluations if found.states]


def _front(found: Findings, name: str) -> Figure:
    said = []
    with style.canvas((5.2, 4.4)) as canvas:
        axes = canvas.subplots()
        for i, method in enumerate(found.study.methods):
            states = [state for state in found.states if state.method == method]
            if not states:
                continue
            points = 100 * np.array([[found.accuracy(name, s, kind) for kind in ("clean", "robust")] for s in states])
            border = staircase(points)
            look = style.marker(i)
            axes.plot(*border.T, color=look["color"], linewidth=0.9, alpha=0.7)
            axes.plot(points[:, 0], points[:, 1], linestyle="", markersize=4, alpha=0.5, **look)
            main = [p for p, state in zip(points, states) if state.main]
            label = style.label(found.study.labels[method])
            for x, y in main:
                axes.plot(x, y, linestyle="", markersize=9, markeredgecolor="black", label=label, **look)
                said.append(f"{found.study.labels[method]} {x:.1f} % clean and {y:.1f} % robust")
            if not main:
                axes.plot([], [], linestyle="", label=label, **look)
        axes.set(xlabel="clean accuracy, %", ylabel="robust accuracy, %", title=style.label(name))
        canvas.legend(loc="outside lower center", ncols=2, fontsize=7)
        alt = f"Clean against robust accuracy on {name}, at the tuned settings: {'; '.join(said)}."
        caption = (
            "Large: the tuned settings, a mean over seeds; small: other settings, of one seed where only the tuning "
            "tried them; lines: the front of each method."
        )
        return style.finish(f"front-{file_name(name)}", alt, canvas, caption)


def curves(found: Findings) -> list[Figure]:
    """Draw robust accuracy over seconds and over images; none without measurements on the way."""
    drawn = [_curve(found, over) for over in ("seconds", "images")] if found.study.curve else []
    return [figure for figure in drawn if figure is not None]


def _curve(found: Findings, over: str) -> Figure | None:
    said = []
    with style.canvas((5.2, 4.4)) as canvas:
        axes = canvas.subplots()
        for i, method in enumerate(found.study.methods):
            way = found.trajectory(found.main[method], over) if method in found.main else None
            if way is None:
                continue
            by_seed = 100 * way.flags.mean(2)  # [S,T]
            costs, mean = way.costs.mean(0), by_seed.mean(0)
            label = found.study.labels[method]
            axes.plot(
                costs, mean, label=style.label(label), markersize=3, marker=style.marker(i)["marker"], **style.line(i)
            )
            if len(by_seed) > 1:
                spread = np.maximum(by_seed.std(0, ddof=1), LEAST)
                axes.fill_between(
                    costs, mean - spread, mean + spread, color=style.line(i)["color"], alpha=0.12, linewidth=0
                )
            said.append(f"{label} from {mean[0]:.1f} % to {mean[-1]:.1f} % at {costs[-1]:.0f}")
        if not said:
            return None
        axes.set(xlabel=over, ylabel="robust accuracy on the way, %", title=f"robust accuracy against {over}")
        axes.set_xlim(left=0)
        canvas.legend(loc="outside lower center", ncols=2, fontsize=7)
        alt = f"Robust accuracy against {over} of training: {'; '.join(said)}."
        return style.finish(f"curve-{over}", alt, canvas, "Band: standard deviation over seeds.")
