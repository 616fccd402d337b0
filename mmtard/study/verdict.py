"""What a study found, in plain sentences that follow from its numbers alone: a gain, a trade, a loss, or nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..report.tables import NONE
from .collect import KINDS, alarms
from .findings import Findings
from .front import Estimate
from .gains import front_gains
from .runs import run_folder
from .tables import one_seed, speed

SURE = 0.05


@dataclass(frozen=True)
class Said:
    """A sentence, and those that belong to it."""

    line: str
    more: list[str] = field(default_factory=list)


def verdict(found: Findings) -> list[Said]:
    """What is said of the baseline, and of each method that is neither it nor an ablation."""
    if found.baseline is None:
        return [Said("No method with one teacher or none has been measured yet, so that nothing is compared.")]
    labels, speeds = found.study.labels, _speed_sentences(found)
    baseline = found.main[found.baseline]
    numbers = ", ".join(
        f"{name} {100 * found.accuracy(name, baseline, 'clean'):.1f} clean and "
        f"{100 * found.accuracy(name, baseline, 'robust'):.1f} robust"
        for name in found.study.evaluations
    )
    chosen = "the best with one teacher or none by validation data"
    if not found.study.validation:
        chosen = "the first in the study with one teacher or none, for want of validation data to choose by"
    first = f"The baseline is “{labels[found.baseline]}”, {chosen}: {numbers}"
    said = [Said(one) for one in one_seed(found)] + [Said(f"{first} (%).", speeds.get(found.baseline, []))]
    for method in found.main:
        if method != found.baseline and found.study.methods[method].ablates is None:
            said.append(Said(_sentence(found, method), _front_sentences(found, method) + speeds.get(method, [])))
    doubts = _doubts(found)
    return said + ([Said("Before these numbers are believed:", doubts)] if doubts else [])


def lines(found: Findings) -> list[str]:
    """The same, a line for each sentence: those that belong to another are indented."""
    return [line for said in verdict(found) for line in (said.line, *(f"  {more}" for more in said.more))]


def _sentence(found: Findings, method: str) -> str:
    gains, losses, level = [], [], []
    for name in found.study.evaluations:
        for kind in KINDS:
            difference, holm_p = found.against(found.baseline, name, kind).get(method, (None, 1.0))
            if difference is None:
                continue
            text = f"{name} {kind} {100 * difference.mean:+.1f} (p {holm_p:.2g})"
            (level if holm_p >= SURE else gains if difference.mean > 0 else losses).append(text)
    if gains and losses:
        kind = "trades one accuracy for another"
    elif gains:
        kind = "gains on the baseline"
    elif losses:
        kind = "loses to the baseline"
    else:
        kind = "is level with the baseline"
    parts = [f"more: {', '.join(gains)}"] if gains else []
    parts += [f"less: {', '.join(losses)}"] if losses else []
    parts += [f"not told apart: {', '.join(level)}"] if level else []
    return f"“{found.study.labels[method]}” {kind} at the tuned settings. In points, {'; '.join(parts)}."


def _front_sentences(found: Findings, method: str) -> list[str]:
    """Whether its whole front dominates more, for each evaluation with several settings."""
    told = []
    for name in found.study.evaluations:
        if len(found.front_states(method)) < 2:
            continue
        gains = front_gains(found, name, method)
        if gains.area_gain is None:
            continue
        low, high = gains.area_gain.low, gains.area_gain.high
        reach = (
            "dominates a larger area than" if low > 0
            else "dominates a smaller area than" if high < 0
            else "dominates an area not told apart from"
        )  # fmt: skip
        at = ""
        if gains.at_equal is not None:
            at = f"; at the baseline's robust accuracy {_points(gains.at_equal)} of clean accuracy"
            if gains.at_equal_all is not None and _several_baselines(found):
                at += f", and {_points(gains.at_equal_all)} against all baselines together"
        told.append(f"Its front on {name} {reach} the baseline's{at}.")
    return told


def _doubts(found: Findings) -> list[str]:
    """The checks that an evaluation failed, and the trainings that overfitted to their attack."""
    told = []
    for (name, measured), one in {**found.outcomes, **found.models}.items():
        told += [f"The evaluation {name} of {measured} fails its check of health: {check}." for check in one.failed]
    for state in found.states:
        for run in state.runs:
            for alarm in alarms(run_folder(found.study, run)):
                told.append(f"The training {run.words} overfitted to its one-step attack {alarm}.")
    return told


def _points(one: Estimate) -> str:
    unknown = f"; not as robust in {100 * one.unknown:.0f} % of resamples" if one.unknown > 0.005 else ""
    return f"{100 * one.value:+.1f} points ({100 * one.low:+.1f} to {100 * one.high:+.1f}, p {one.p:.2g}{unknown})"


def _several_baselines(found: Findings) -> bool:
    return sum(found.study.methods[name].baseline for name in found.main) > 1


def _speed_sentences(found: Findings) -> dict[str, list[str]]:
    """Method -> how early it is as robust as the method that it is held against ends, where it comes to be."""
    table, told = speed(found), {}
    if table is None:
        return told
    against = found.study.curve.against or found.baseline
    methods = {found.study.labels[m]: m for m in found.main if m != against}
    for name, cells in table.rows:
        if name in methods and cells[0].text not in ("never", NONE.text):
            k = cells[0].text if cells[0].text.startswith("≥") else f"= {cells[0].text}"
            told[methods[name]] = [
                f"It reaches the final robust accuracy of “{found.study.labels[against]}” in 1/k of that method's "
                f"seconds, k {k} ({cells[0].below})."
            ]
    return told
