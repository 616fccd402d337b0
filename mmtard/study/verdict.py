"""What a study found, in plain sentences that follow from its numbers alone: a gain, a trade, a loss, or nothing."""

from __future__ import annotations

from ..report.tables import NONE
from .collect import KINDS
from .findings import Findings
from .gains import front_gains
from .tables import speed

SURE = 0.05


def verdict(found: Findings) -> list[str]:
    """A sentence for the baseline, and one for each method that is neither it nor an ablation."""
    if found.baseline is None:
        return ["No method with one teacher or none has been measured yet, so that nothing is compared."]
    labels = found.study.labels
    baseline = found.main[found.baseline]
    numbers = ", ".join(
        f"{name} {100 * found.accuracy(name, baseline, 'clean'):.1f} clean and "
        f"{100 * found.accuracy(name, baseline, 'robust'):.1f} robust"
        for name in found.study.evaluations
    )
    lines = [f"The best with one teacher or none, by validation data, is {labels[found.baseline]}: {numbers} (%)."]
    for method in found.main:
        if method != found.baseline and found.study.methods[method].ablates is None:
            lines.append(_sentence(found, method))
            lines += _front_sentences(found, method)
    return lines + _speed_sentences(found)


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
        kind = "trades"
    elif gains:
        kind = "gains"
    elif losses:
        kind = "loses"
    else:
        kind = "is level"
    parts = [f"more: {', '.join(gains)}"] if gains else []
    parts += [f"less: {', '.join(losses)}"] if losses else []
    parts += [f"not told apart: {', '.join(level)}"] if level else []
    return f"{found.study.labels[method]} {kind} at the tuned settings ({'; '.join(parts)})."


def _front_sentences(found: Findings, method: str) -> list[str]:
    """Whether its whole front lies further out, for each evaluation with several settings."""
    lines = []
    for name in found.study.evaluations:
        if sum(state.method == method for state in found.states) < 2:
            continue
        gains = front_gains(found, name, method)
        gain, equal, of_all = gains.area_gain, gains.at_equal, gains.at_equal_all
        if gain is None:
            continue
        reach = "further out than" if gain.low > 0 else "within" if gain.high < 0 else "not told apart from"
        at = ""
        if equal is not None:
            at = (
                f"; at the baseline's robustness its front is {100 * equal.value:+.1f} points clean "
                f"({100 * equal.low:+.1f} to {100 * equal.high:+.1f})"
            )
            if of_all is not None and _several_baselines(found):
                at += (
                    f", and {100 * of_all.value:+.1f} ({100 * of_all.low:+.1f} to {100 * of_all.high:+.1f}) against "
                    "all baselines together"
                )
        lines.append(f"{found.study.labels[method]}, front on {name}: {reach} the baseline's{at}.")
    return lines


def _several_baselines(found: Findings) -> bool:
    return sum(found.study.methods[name].baseline for name in found.main) > 1


def _speed_sentences(found: Findings) -> list[str]:
    table = speed(found)
    if table is None:
        return []
    against = found.study.curve.against or found.baseline
    told = {found.study.labels[m] for m in found.main if m != against and found.study.methods[m].ablates is None}
    return [
        f"{name} reaches the final robust accuracy of {found.study.labels[against]} in 1/k of its seconds, "
        f"k = {cells[0].text} ({cells[0].below})."
        for name, cells in table.rows
        if name in told and cells[0].text not in ("never", NONE.text)
    ]
