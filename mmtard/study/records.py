"""A study's numbers as small CSV files, one fact a line, with how they came to be: for programs, and to be kept."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math

from ..runs.environment import environment
from .collect import KINDS, alarms
from .crossed import Difference
from .findings import Findings
from .gains import front_gains
from .runs import Run, points, run_folder


def files(found: Findings, command: str) -> dict[str, str]:
    """Name -> content of every file."""
    return {
        "runs.csv": _runs(found),
        "differences.csv": _differences(found),
        "matched.csv": _matched(found),
        "settings.csv": _settings(found),
        "fronts.csv": _fronts(found),
        "curves.csv": _curves(found),
        "tuning.csv": _tuning(found),
        "made_with.json": _made_with(found, command),
    }


def _runs(found: Findings) -> str:
    rows = []
    for state in found.states:
        for run in state.runs:
            spent = found.cost(run)
            for name in found.study.evaluations:
                one = found.outcomes[name, run.name]
                values = {"clean": one.accuracy("clean"), "robust": one.accuracy("robust"), "n": len(one.ids)}
                costs = {
                    "seconds": f"{spent.seconds:.1f}",
                    "images": spent.images,
                    "gflop_an_image": f"{spent.gflop:.4g}",
                    "alarms": len(alarms(run_folder(found.study, run))),
                }
                rows.append({**_named(run), "main": int(state.main), "evaluation": name, **values, **costs})
    for (name, model), one in found.models.items():
        values = {"clean": one.accuracy("clean"), "robust": one.accuracy("robust"), "n": len(one.ids)}
        rows.append({"method": model, "setting": "", "seed": "", "main": 0, "evaluation": name, **values})
    return _csv(rows)


def _differences(found: Findings) -> str:
    rows = []
    for other in found.main:
        for name in found.study.evaluations:
            for kind in KINDS:
                for method, (d, adjusted) in found.against(other, name, kind).items():
                    is_best = int(other == found.baseline)
                    of = {"method": method, "minus": other, "best_baseline": is_best, "evaluation": name, "kind": kind}
                    rows.append({**of, **_judged(d, adjusted)})
    return _csv(rows)


def _matched(found: Findings) -> str:
    """All pairs at each point of the front, not corrected for their number."""
    rows = []
    for point in points(found.study):
        states = found.at_point(point.number)
        for other, method in itertools.permutations(states, 2):
            for name, kind in itertools.product(found.study.evaluations, KINDS):
                d = found.between(name, kind, states[method], states[other])
                if d is not None:
                    of = {"setting": point.label, "method": method, "minus": other, "evaluation": name, "kind": kind}
                    rows.append({**of, **_judged(d)})
    return _csv(rows)


def _settings(found: Findings) -> str:
    """Every setting of every method beside every setting of the best baseline, not corrected for their number: whether
    one of a front has more of all accuracies than one of the baseline's.
    """
    rows = []
    for point, beside in itertools.product(points(found.study), repeat=2):
        baseline = found.at_point(beside.number).get(found.baseline or "")
        for method, state in found.at_point(point.number).items():
            for name, kind in itertools.product(found.study.evaluations, KINDS):
                d = found.between(name, kind, state, baseline) if method != found.baseline else None
                if d is not None:
                    of = {"method": method, "setting": point.label}
                    of |= {"minus": found.baseline, "minus_setting": beside.label, "evaluation": name, "kind": kind}
                    rows.append({**of, **_judged(d)})
    return _csv(rows)


def _judged(d: Difference, adjusted: float | None = None) -> dict:
    numbers = {"difference": d.mean, "low95": d.low, "high95": d.high, "p": d.p}
    numbers |= {} if adjusted is None else {"holm_p": adjusted}
    numbers |= {"freedom": d.freedom, "seeds": d.seeds, "samples": d.samples}
    return {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in numbers.items()}


def _fronts(found: Findings) -> str:
    rows = []
    for method in found.front_methods:
        for name in found.study.evaluations:
            gains = front_gains(found, name, method)
            settings = len(found.front_states(method))
            row = {"method": method, "evaluation": name, "settings": settings, "area": f"{gains.area:.6g}"}
            for key, one in (
                ("area_minus_baseline", gains.area_gain),
                ("clean_at_equal_robustness", gains.at_equal),
                ("clean_at_equal_robustness_all_baselines", gains.at_equal_all),
            ):
                numbers = ("",) * 4 if one is None else (one.value, one.low, one.high, one.p)
                ends = ("", "_low95", "_high95", "_p")
                row |= {f"{key}{end}": f"{v:.6g}" if v != "" else "" for end, v in zip(ends, numbers)}
            rows.append(row)
    return _csv(rows)


def _curves(found: Findings) -> str:
    rows = []
    for state in found.tuned_states:
        ways = {over: found.trajectory(state, over) for over in ("seconds", "images")}
        clean = found.trajectory(state, "images", "clean")
        if ways["images"] is None or clean is None:
            continue
        seeds, states, _ = clean.flags.shape
        timed = {} if ways["seconds"] is None else dict(zip(ways["seconds"].seeds, ways["seconds"].costs))
        for s in range(seeds):
            for t in range(states):
                seconds = timed[clean.seeds[s]][t] if clean.seeds[s] in timed else math.nan  # of a run with a gap
                spent = {"seconds": f"{seconds:.1f}", "images": int(ways["images"].costs[s, t])}
                found_there = {"clean": clean.flags[s, t].mean(), "robust": ways["images"].flags[s, t].mean()}
                of = {"method": state.method, "setting": state.label, "main": int(state.main)}
                rows.append({**of, "seed": clean.seeds[s], **spent, **found_there})
    return _csv(rows)


def _tuning(found: Findings) -> str:
    rows = []
    for (method, number), tuned in found.tuned.items():
        if number and not found.study.grid.tune_each:
            continue  # tried at the first point alone
        for label, value in tuned.scores.items():
            chosen = int(label == tuned.run.choice.label)
            rows.append({"method": method, "point": number, "setting": label, "score": value, "chosen": chosen})
    return _csv(rows)


def _made_with(found: Findings, command: str) -> str:
    known = environment([])
    known.pop("command", None)
    known.pop("hosts", None)
    return (
        json.dumps({"command": command, "title": found.study.title, "missing": found.missing, **known}, indent=1) + "\n"
    )


def _named(run: Run) -> dict:
    label = ", ".join(filter(None, (run.point.label, run.choice.label)))
    return {"method": run.method, "setting": label, "seed": run.seed}


def _csv(rows: list[dict]) -> str:
    out = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
