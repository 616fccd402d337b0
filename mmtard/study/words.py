"""What a study compares, in words: each method, and each measurement with its attack."""

from __future__ import annotations

import yaml

from ..config import show_pixels
from ..report.tables import Cell, Table
from .collect import KINDS
from .findings import Findings
from .measures import protocol_of
from .runs import Run, choices, configuration, points
from .schema import START, Contender, Measure

BASELINE = "baseline: one teacher, or none"


def methods(found: Findings) -> Table:
    """What each method is, the part that it plays, and its own settings as the study has them."""
    study, rows = found.study, []
    for name, method in study.methods.items():
        config = configuration(study, Run(name, points(study)[0], choices(study)[0], study.seeds[0]))
        role = BASELINE if method.baseline else ""
        if method.ablates is not None:
            role = f"{study.labels[method.ablates]} but for one part"
        about = (type(config.method).__doc__ or "").strip().partition("\n")[0]
        rows.append((study.labels[name], [Cell(role), Cell(about, _settings(method))]))
    notes = ["Small: what it sets apart from what all share, which the study at the end of the page has in full."]
    return Table([[("method", 1), ("role", 1), ("what it is", 1)]], rows, "Methods", notes, words=True)


def measures(found: Findings) -> Table:
    """Every measurement: what for, of which images, and under which attacks."""
    study, rows = found.study, []
    purposes = [("shown", study.evaluations), ("settings are chosen by it", study.validation)]
    if study.curve is not None:
        purposes.append(("accuracy on the way", {"curve": study.curve.measure}))
    for purpose, of_purpose in purposes:
        for name, measure in of_purpose.items():
            title = f"validation {name}" if of_purpose is study.validation else name
            one = found.models.get((name, START)) if purpose == "shown" else None
            rows.append((title, [Cell(purpose), Cell(_number(measure, one and len(one.ids))), Cell(_attacks(measure))]))
    notes = [
        f"{KINDS[1]}: right as it is, and under each of the attacks, which may change every pixel by eps (of a range "
        "from 0 to 1). pgd and apgd-ce raise the loss on the label, which flatters students of a teacher; apgd-dlr and "
        "apgd-t aim at the margin between classes."
    ]
    head = [[("images", 1), ("what for", 1), ("how many", 1), ("attacks", 1)]]
    return Table(head, rows, "Measurements", notes, words=True)


def _settings(method: Contender) -> str:
    """A method's own settings on one line; of a teacher its name, and whether it is stored."""
    own = dict(method.settings)
    teachers = own.pop("teachers", None)
    parts = [f"configuration {method.configuration}"] if method.configuration else []
    for key, value in own.items():
        shown = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000).strip()
        parts.append(f"{key}: {shown.removesuffix('...').strip()}")
    if isinstance(teachers, dict) and teachers:
        named = (f"{n} (stored)" if isinstance(t, dict) and t.get("stored") else n for n, t in teachers.items())
        parts.append(f"teachers: {', '.join(named)}")
    return "; ".join(parts)


def _number(measure: Measure, known: int | None) -> str:
    if known is not None:
        return str(known)
    n = protocol_of(measure, None).n_samples
    return "all" if n is None else str(n)


def _attacks(measure: Measure) -> str:
    protocol = protocol_of(measure, None)
    return f"{', '.join(protocol.attacks)}; eps {show_pixels(measure.eps)}, {protocol.iters} iterations"
