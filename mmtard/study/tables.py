"""The tables of a study, as the report's pages and files take them."""

from __future__ import annotations

import itertools
import statistics

import numpy as np

from ..report.style import file_name
from ..report.tables import NONE, Cell, Table
from .collect import KINDS
from .crossed import Difference
from .efficiency import own_speed_up, speed_up
from .findings import Findings, State
from .front import Estimate
from .gains import front_gains
from .runs import points
from .schema import START

SEVERAL = "±: standard deviation of a run over seeds, n - 1 in its denominator"


def accuracies(found: Findings) -> Table:
    """Mean and standard deviation over seeds of every method at its tuned settings; the models that were given."""
    rows = []
    for method, state in found.main.items():
        label = found.study.labels[method] + (" (baseline)" if found.study.methods[method].baseline else "")
        rows.append((label, [_spread(found, n, state, k) for n in found.study.evaluations for k in KINDS]))
    for model in [START, *found.study.models]:
        cells = []
        for name in found.study.evaluations:
            one = found.models.get((name, model))
            cells += [NONE] * 2 if one is None else [Cell(_percent(one.accuracy(kind))) for kind in KINDS]
        rows.append((f"{model} (not compared)", cells))
    chance = ", ".join(f"{n} {_percent(o.chance)}" for (n, m), o in found.models.items() if m == START)
    notes = [f"In %. {SEVERAL}; small: seeds. Chance level: {chance or 'not known'}."]
    notes.append("Clean accuracy is of the samples that were attacked, so that both columns are of the same.")
    return Table(_head(found), rows, "Accuracy at the tuned settings", notes, "accuracy")


def differences(found: Findings) -> Table | None:
    """Every method against the best baseline, judged over samples and seeds."""
    if found.baseline is None or len(found.main) < 2:
        return None
    columns = {(n, k): found.against(found.baseline, n, k) for n in found.study.evaluations for k in KINDS}
    rows = [
        (found.study.labels[m], [_difference(columns[at].get(m)) for at in columns])
        for m in found.main
        if m != found.baseline
    ]
    notes = [
        "In points; small: 95 % interval, p of the mixed model over samples and seeds, and p after Holm's correction "
        "for the methods of the column. The baseline is the one of these that scores best on validation data.",
        *one_seed(found),
    ]
    caption = f"Difference from {found.study.labels[found.baseline]}, the best with one teacher or none"
    return Table(_head(found), rows, caption, notes, "differences")


def ablations(found: Findings) -> Table | None:
    """Every method that is another but for one part, against that one: what the part is worth."""
    rows = []
    for name, method in found.study.methods.items():
        if method.ablates is not None and name in found.main and method.ablates in found.main:
            cells = []
            for evaluated in found.study.evaluations:
                for kind in KINDS:
                    d = found.difference(evaluated, kind, name, method.ablates)
                    cells.append(_difference(None if d is None else (d, None)))
            rows.append((f"{found.study.labels[name]} minus {found.study.labels[method.ablates]}", cells))
    if not rows:
        return None
    notes = ["In points: what is lost (-) or gained (+) by the change; small: 95 % interval and p, not corrected."]
    return Table(_head(found), rows, "Ablations: one part changed at a time", notes + one_seed(found), "ablations")


def fronts(found: Findings) -> list[Table]:
    """Of each evaluation: the area that each method dominates, and its clean accuracy at equal robustness."""
    return [_front(found, name) for name in found.study.evaluations] if found.front_methods else []


def _front(found: Findings, name: str) -> Table:
    rows = []
    for method in found.front_methods:
        gains = front_gains(found, name, method)
        cells = [Cell(f"{100 * gains.area:.2f}"), _estimate(gains.area_gain)]
        cells += [_estimate(gains.at_equal), _estimate(gains.at_equal_all)]
        settings = len(found.front_states(method))
        rows.append((f"{found.study.labels[method]}, {settings} setting{'s' * (settings > 1)}", cells))
    titles = ["area", "area minus the baseline's", "clean at equal robustness", "the same, to all baselines"]
    x, y = found.study.front.reference
    notes = [
        f"area: of clean x robust accuracy dominated from the corner ({x:g}, {y:g}), in % of the unit square. Settings "
        "that lie further apart dominate more of it, on the same line too: a gain shows at equal robustness.",
        "Settings with fewer seeds than others, such as those that only the tuning tried, are drawn but not counted. "
        "A front that lacks a setting of the baseline's is not compared (–), nor is any with a joint front that does.",
        "clean at equal robustness: the front's clean accuracy, less that of the baseline's front, where the baseline "
        "at its tuned settings is as robust; in points; – where the method has no setting as robust. To all baselines: "
        "less the front of all methods with one teacher or none together.",
        "small: 95 % interval and p over resampled seeds and samples (pigeonhole bootstrap), not corrected for the "
        "number of rows; a few seeds make both too sure, as three seeds by sqrt(2/3).",
    ]
    head = [[("method", 1), *((title, 1) for title in titles)]]
    caption = f"The front of clean and robust accuracy on {name}"
    return Table(head, rows, caption, notes, f"front-{file_name(name)}")


def matched(found: Findings) -> Table | None:
    """Every method against the baseline at the same point of the front, each at the settings chosen for that point."""
    rows = []
    for point in points(found.study) if found.baseline is not None else []:
        states = found.at_point(point.number)
        for method in states:
            if method != found.baseline and found.study.methods[method].ablates is None:
                pair = states[method], states.get(found.baseline)
                cells = []
                for name, kind in itertools.product(found.study.evaluations, KINDS):
                    d = found.between(name, kind, *pair)
                    cells.append(_difference(None if d is None else (d, None)))
                rows.append((f"{point.label}: {found.study.labels[method]}", cells))
    if len(points(found.study)) < 2 or not rows:
        return None
    notes = ["In points; small: 95 % interval and p over samples and seeds, not corrected for the number of rows."]
    caption = f"Difference from {found.study.labels[found.baseline]} at the same setting"
    return Table(_head(found), rows, caption, notes, "matched")


def speed(found: Findings) -> Table | None:
    """How much sooner each method is as robust as one of them ends."""
    against = found.study.curve and (found.study.curve.against or found.baseline)
    if not against or against not in found.main:
        return None
    rows = []
    for state in found.tuned_states:
        cells = []
        for over in ("seconds", "images"):
            ours, theirs = found.trajectory(state, over), found.trajectory(found.main[against], over)
            if ours is None or theirs is None or ours.seeds != theirs.seeds:
                cells.append(NONE)
            elif state is found.main[against]:
                cells.append(Cell(f"{own_speed_up(theirs):.2f}", "itself, by its own curve"))
            else:
                resampling = found.resampling(ours.flags.shape[0], ours.flags.shape[2])
                k = speed_up(ours, theirs, resampling)
                at_once = ours.flags[:, 0].mean() >= theirs.flags[:, -1].mean()  # when it did before is not known
                text = f"{'≥ ' * bool(at_once)}{k.value:.2f}" if k.value else "never"
                cells.append(Cell(text, f"{k.low:.2f} to {k.high:.2f}"))
        rows.append((found.label(state), cells))
    label = found.study.labels[against]
    notes = [
        f"k: the whole cost of {label}, divided by the cost at which the method's curve first reaches the robust "
        f"accuracy that {label} ends with; small: 95 % interval over resampled seeds and samples.",
        "0: not reached. ≥: it was as robust at its first state already.",
        "A curve's early states are of a learning-rate schedule that is not over: a run planned shorter may do better.",
        f"Seconds are those of the training steps, {found.study.at_once} run(s) side by side.",
    ]
    head = [[("method", 1), ("in seconds, k", 1), ("in images, k", 1)]]
    return Table(head, rows, f"Reaches the final robust accuracy of {label} in 1/k of its cost", notes, "speed")


def costs(found: Findings) -> Table:
    """GFLOP an image, images and seconds of each method's runs, at each point of the front."""
    rows = []
    for state in found.tuned_states:
        spent = [found.cost(run) for run in state.runs]
        timed = [one for one in spent if not np.isnan(one.seconds)]
        gflop = spent[0].gflop
        cells = [Cell("–" if np.isnan(gflop) else f"{gflop:.3g}"), Cell(str(spent[0].images))]
        cells.append(_mean([one.seconds for one in timed], "{:.0f}") if timed else Cell("?"))
        cells.append(
            _mean([one.images / one.seconds for one in timed if one.seconds], "{:.0f}") if timed else Cell("?")
        )
        storing = spent[0].stored
        cells.append(Cell("?" if storing is None else f"{storing:.0f}" if storing else "–"))
        rows.append((found.label(state), cells))
    columns = ("method", "GFLOP an image", "images", "seconds", "images/s", "storing, once, s")
    head = [[(column, 1) for column in columns]]
    notes = [
        "GFLOP an image: attack, teachers and student, a multiply-add counted as two. Seconds are those of the "
        f"training steps, {found.study.at_once} run(s) side by side; ?: not known, since a crash "
        f"took metrics of every run; in no curve. {SEVERAL}.",
        "storing: of the teachers' embeddings that it reads, once for all of its runs; counted in the curves. ?: not "
        "known, as of a job that stored them, and in no curve.",
    ]
    return Table(head, rows, "Cost of a training", notes, "cost")


def tuning(found: Findings) -> Table | None:
    """The score of every combination of the grid on validation data, and the one that each method is run with."""
    if not found.study.needs_tuning:
        return None
    labels = list(dict.fromkeys(label for tuned in found.tuned.values() for label in tuned.scores))
    rows, edges = [], []
    for (method, number), tuned in found.tuned.items():
        if number and not found.study.grid.tune_each:
            continue
        name = ", ".join(filter(None, (found.study.labels[method], tuned.run.point.label)))
        best = tuned.run.choice.label
        rows.append((name, [Cell(_percent(tuned.scores[x]), "chosen" if x == best else "") for x in labels]))
        edges += [f"{name}: {key} = {tuned.run.choice.settings[key]}" for key in tuned.at_edge]
    notes = [
        "The mean of clean and robust accuracy on the validation data, in %, of the first seed. Neither accuracies nor "
        "fronts are measured on them."
    ]
    if edges:
        notes.append(f"At the edge of its grid, so that a better value may lie beyond: {'; '.join(edges)}.")
    return Table(
        [[("method", 1), *((x, 1) for x in labels)]], rows, "What the settings were chosen by", notes, "tuning"
    )


# ---------------------------------------------------------------- the parts


def _head(found: Findings) -> list[list[tuple[str, int]]]:
    names = list(found.study.evaluations)
    return [[("", 1), *((n, 2) for n in names)], [("method", 1), *((k, 1) for _ in names for k in KINDS)]]


def _spread(found: Findings, name: str, state: State, kind: str) -> Cell:
    values = [100 * v for v in found.flags(name, state, kind).mean(1)]
    return _mean(values, "{:.1f}", f"{len(values)} seed{'s' * (len(values) > 1)}")


def _mean(values: list[float], form: str, below: str = "") -> Cell:
    if not values:
        return NONE
    spread = f" ± {form.format(statistics.stdev(values))}" if len(values) > 1 else ""
    return Cell(form.format(statistics.fmean(values)) + spread, below)


def _difference(one: tuple[Difference, float | None] | None) -> Cell:
    if one is None:
        return NONE
    d, adjusted = one
    corrected = "" if adjusted is None else f", Holm {adjusted:.2g}"
    return Cell(f"{100 * d.mean:+.1f}", f"{100 * d.low:+.1f} to {100 * d.high:+.1f}, p {d.p:.2g}{corrected}")


def _estimate(one: Estimate | None) -> Cell:
    if one is None:
        return NONE
    unknown = f", {100 * one.unknown:.0f} % not as robust" if one.unknown > 0.005 else ""
    return Cell(f"{100 * one.value:+.2f}", f"{100 * one.low:+.2f} to {100 * one.high:+.2f}, p {one.p:.2g}{unknown}")


def one_seed(found: Findings) -> list[str]:
    """What is said of methods of one seed, if there are any."""
    few = [found.study.labels[m] for m, state in found.main.items() if len(state.runs) == 1]
    return (
        [f"One seed of {', '.join(few)}: judged over samples alone, so of these models, not of the methods."]
        if few
        else []
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
