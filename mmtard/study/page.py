"""A study's page and files: STUDY/page/study.html, figures, tables as CSV and LaTeX, and the numbers behind them."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import UserError
from ..files import why_not_written
from ..folders import check_replaceable, replace_folder
from ..report.page import environment
from ..report.shown import typed
from ..report.style import Figure
from ..report.table_files import as_csv, as_latex
from ..report.tables import Table
from ..resources import VERSION
from . import figures, records, tables, words
from .findings import Findings
from .loading import dump
from .schema import Study
from .verdict import verdict

FOLDER, PAGE, TEMPLATE = "page", "study.html", "page.html.j2"
KIND = "study"
INTROS = {
    "compared": "All methods train for the same number of steps, on batches of one size.",
    "accuracy": "Each method at the settings that its tuning chose. Clean: the share of images that are named right. "
    "Robust: the share that is still named right under every attack. A difference is one of the methods where "
    "its p, after Holm's correction, is below 0.05.",
    "front": "A method can buy robust accuracy with clean accuracy: by its learning rate, or by a stronger attack in "
    "training. So a single point says little. A method that only trades moves along the line of another one; a method "
    "that gains has a line further up and to the right.",
    "speed": "How early in its training a method is as robust as the one that it is held against is at its end.",
    "ablations": "A method against the same one but for one part: a part without which nothing is lost does nothing.",
    "cost": "What one training takes.",
    "tuning": "Every method was tried at the same values, and trained at its best. The data that decide are in no "
    "accuracy or front.",
}


@dataclass(frozen=True)
class Section:
    """A part of the page under its own heading."""

    anchor: str
    title: str
    intro: str  # how it is read, for who sees such a page for the first time
    figures: list[Figure]
    tables: list[Table]


def check_folder(study: Study) -> None:
    """Raise UserError where the page would replace something that no study wrote; before hours of work."""
    check_replaceable(Path(study.out) / FOLDER, KIND)


def write(found: Findings, command: str) -> Path:
    """Write the page and its files; return the page's path. Raises UserError where they cannot be written."""
    sections = _sections(found)
    made = records.files(found, command)
    out = Path(found.study.out) / FOLDER
    try:
        with replace_folder(out, KIND) as scratch:
            (scratch / PAGE).write_text(_render(found, sections, command, made["made_with.json"]), encoding="utf-8")
            for name, text in made.items():
                (scratch / name).write_text(text, encoding="utf-8")
            for figure in (figure for section in sections for figure in section.figures):
                for kind, data in {"png": figure.png, **figure.vector}.items():
                    (scratch / f"{figure.name}.{kind}").write_bytes(data)
            for table in (table for section in sections for table in section.tables if table.name):
                (scratch / f"table-{table.name}.csv").write_text(as_csv(table), encoding="utf-8")
                (scratch / f"table-{table.name}.tex").write_text(as_latex(table), encoding="utf-8")
    except OSError as error:
        raise UserError(why_not_written(out, error)) from None
    return out / PAGE


def _sections(found: Findings) -> list[Section]:
    made = [
        Section("compared", "What is compared", INTROS["compared"], [], [words.methods(found), words.measures(found)]),
        Section(
            "accuracy", "Accuracy and differences", INTROS["accuracy"], [],
            [tables.accuracies(found), tables.differences(found)],
        ),
        Section(
            "front", "The front", INTROS["front"], figures.fronts(found),
            [*tables.fronts(found), tables.matched(found)],
        ),
        Section(
            "speed", "Robustness over time", INTROS["speed"], figures.curves(found), [tables.speed(found)]
        ),
        Section("ablations", "Ablations", INTROS["ablations"], [], [tables.ablations(found)]),
        Section("cost", "Cost", INTROS["cost"], [], [tables.costs(found)]),
        Section("tuning", "Tuning", INTROS["tuning"], [], [tables.tuning(found)]),
    ]  # fmt: skip
    made = [replace(s, tables=[t for t in s.tables if t is not None]) for s in made]
    return [s for s in made if s.figures or s.tables]


def _render(found: Findings, sections: list[Section], command: str, made_with: str) -> str:
    study = found.study
    runs = sum(len(state.runs) for state in found.states)
    seeds, tuned = ", ".join(map(str, study.seeds)), ", ".join(study.grid.tune)
    counts = (
        f"{len(study.methods)} methods, {runs} trainings, seeds {seeds}. Each method was tuned on one grid "
        f"({tuned}) by one "
        "score on validation data, and trained at one budget."
    )
    return (
        environment("mmtard.study")
        .get_template(TEMPLATE)
        .render(
            study=study,
            verdict=verdict(found),
            missing=found.missing,
            sections=sections,
            counts=counts,
            command=typed(command),
            written_study=dump(study),
            made_with=made_with,
            written=time.strftime("%Y-%m-%d %H:%M %Z"),
            version=VERSION,
        )
    )
