"""The page: everything found of the given runs and models, in one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from ..errors import UserError
from ..files import why_not_written
from ..folders import check_replaceable, replace_folder
from ..resources import VERSION
from ..runs import history
from . import accuracy, curves, seeds, sources, tables
from .attacked_images import Strip, strip
from .groups import Group, group
from .records import Check
from .run_files import ReportSource
from .shown import typed, visible
from .style import COLOURS, Figure
from .table_files import as_csv, as_latex
from .tables import Table

PAGE, TEMPLATE = "report.html", "page.html.j2"
KIND = "report"
STATUSES = ("FAIL", "WARN", "PASS")


@dataclass(frozen=True)
class Section:
    """A block of figures under its own heading; `note` says how to read them, `missing` why there are none."""

    title: str
    figures: list[Figure]
    missing: str
    note: str = ""


@dataclass
class Content:
    """All that the page shows, in its order."""

    sources: list[ReportSource]
    comparison: list[Section]
    tables: list[Table]
    strips: list[Strip]
    radii: list[Section]
    health: list[tuple[str, str, Check]]
    training: list[Section]
    details: list[Table]

    @property
    def missing(self) -> dict[str, list[str]]:
        """What was not found, in words -> of whom."""
        told = [(text, source.name) for source in self.sources for text in source.missing]
        told += [(f"attacked images: {s.missing}", s.title) for s in self.strips if s.missing]
        if any(source.is_run for source in self.sources):
            told += [(f"{s.title}: {s.missing}", "all runs") for s in self.training if not s.figures]
        found: dict[str, list[str]] = {}
        for text, name in told:
            found.setdefault(text, []).append(name)
        return found

    @property
    def figures(self) -> list[Figure]:
        """Every figure once, with a name of its own."""
        blocks = [f for section in (*self.comparison, *self.radii, *self.training) for f in section.figures]
        names: dict[str, int] = {}
        unique = []
        for figure in [*blocks, *(shown.figure for s in self.strips for shown in s.samples)]:
            names[figure.name] = names.get(figure.name, 0) + 1
            n = names[figure.name]
            unique.append(figure if n == 1 else replace(figure, name=f"{figure.name}-{n}"))
        return unique


def report(paths: list[Path], out: Path, images: int = 6, command: str = "", labels: list[str] | None = None) -> Path:
    """Write OUT/report.html, its figures as PNG, SVG and PDF and its tables as CSV and LaTeX; return the page's path.

    paths: run or model folders, results.json files, or folders with any of these below. images: samples shown under
    attack for each model, 0 for none. labels: names for the models, one for each path or for each model found. Raises
    UserError for a path that is none of these, and when OUT holds what no report of mmtard wrote.
    """
    check_replaceable(out, KIND)  # before minutes of work
    content = _content(sources.read(paths, labels), images)
    page = _render(content, command)
    try:
        with replace_folder(out, KIND) as scratch:
            _write(scratch, page, content)
    except OSError as error:
        raise UserError(why_not_written(out, error)) from None
    return out / PAGE


def _write(folder: Path, page: str, content: Content) -> None:
    (folder / PAGE).write_text(page, encoding="utf-8")
    for figure in content.figures:
        for kind, data in {"png": figure.png, **figure.vector}.items():
            (folder / f"{figure.name}.{kind}").write_bytes(data)
    for table in content.tables:
        (folder / f"{table.name}.csv").write_text(as_csv(table), encoding="utf-8")
        (folder / f"{table.name}.tex").write_text(as_latex(table), encoding="utf-8")


def _content(found: list[ReportSource], images: int) -> Content:
    """What is shown of the sources. One whose numbers cannot be shown is told, and the others stay."""
    groups = group(found)
    measured = [i for i, source in enumerate(found) if source.evaluations] if images else []
    return Content(
        sources=found,
        comparison=[_scatter(g, n, found) for n, g in enumerate(groups) if any(g.models) and g.eps],
        tables=_tables(found, groups),
        strips=[strip(found[i], i, images) for i in measured],
        radii=[_against_eps(g, n, found) for n, g in enumerate(groups) if any(g.models) and g.eps],
        health=_health(found),
        training=_training(found),
        details=[
            tables.details(evaluation.zeroshot, f"{source.name}: {evaluation.path}")
            for source in found
            for evaluation in reversed(source.evaluations)
            if evaluation.zeroshot
        ],
    )


def _tables(found: list[ReportSource], groups: list[Group]) -> list[Table]:
    made = []
    for n, g in enumerate(groups):
        if any(g.models):
            made.append(tables.pivot(g, found, f"accuracy-{n}"))
            made.append(seeds.means(g, found, f"seeds-{n}"))
        if any(g.retrieval):
            made.append(tables.retrieval(g, found, f"retrieval-{n}"))
    return [table for table in made if table is not None]


def _scatter(g: Group, number: int, found: list[ReportSource]) -> Section:
    several = any(len(model) > 1 for model in g.models)
    marks = "Large: mean over the model's datasets; small: each dataset. " if several else ""
    note = f"{g.title}. {marks}Dotted: nothing lost to the attack."
    return Section("Clean against robust accuracy", accuracy.scatter(g, number, found), "no dataset was attacked", note)


def _against_eps(g: Group, number: int, found: list[ReportSource]) -> Section:
    note = f"{g.title}. Bars: 95 % interval; at 0 the clean accuracy of the attacked samples."
    return Section("Accuracy against eps", accuracy.against_eps(g, number, found), "no dataset was attacked", note)


def _training(found: list[ReportSource]) -> list[Section]:
    """The sections of training, empty ones too: what is missing in them is told at the end."""
    trajectory = accuracy.trajectory(found)
    probes = [*curves.probes(found), *([trajectory] if trajectory else [])]
    return [
        Section("Loss terms", curves.losses(found), "no run has a metrics.jsonl with a loss"),
        Section("Teacher weights", curves.teacher_weights(found), "no method here weights its teachers by sample"),
        Section("Accuracy during training", probes, "no run has a probes.jsonl"),
        Section("Optimisation", curves.optimisation(found), "no run has a metrics.jsonl with a learning rate"),
        Section("Throughput and memory", curves.speed(found), "no run has a metrics.jsonl with its speed"),
    ]


def _render(content: Content, command: str) -> str:
    shown = [s for s in content.strips if s.samples]
    return (
        environment()
        .get_template(TEMPLATE)
        .render(
            content=content,
            sources=[(source, COLOURS[i % len(COLOURS)]) for i, source in enumerate(content.sources)],
            strips=shown,
            glance=[shown[0], *shown[1:][-1:]] if shown else [],
            training=[section for section in content.training if section.figures],
            command=typed(command),
            version=VERSION,
            written=time.strftime("%Y-%m-%d %H:%M %Z"),
        )
    )


def environment(*packages: str) -> Environment:
    """Return what pages are made with: the templates of `packages`, then the report's, and filters."""
    made = Environment(
        loader=ChoiceLoader([PackageLoader(package, ".") for package in (*packages, "mmtard.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )
    made.filters |= {
        "data_uri": _data_uri,
        "json": _json,
        "line": json.dumps,
        "how_it_ended": _how_it_ended,
        "lines": lambda text: Markup(escape(visible(text, lines=True))),
        "typed": typed,
    }
    return made


def _visible(value: object) -> object:
    """Text and paths with their control characters written out; what is markup already, and numbers, as they are."""
    return visible(value) if isinstance(value, str | Path) and not isinstance(value, Markup) else value


def _health(found: list[ReportSource]) -> list[tuple[str, str, Check]]:
    """(model, dataset, check) of every evaluation, what failed first."""
    lines = [
        (source.name, dataset.name, check)
        for source in found
        for evaluation in source.evaluations
        for dataset in evaluation.datasets
        for check in dataset.health
    ]
    return sorted(lines, key=lambda line: STATUSES.index(line[2].status))


def _how_it_ended(start: dict) -> str:
    kind, reason = history.end_kind(start), history.end_reason(start)
    return reason if reason.startswith(kind) else f"{kind}: {reason}"


def _json(value) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, default=str)


def _data_uri(figure: Figure) -> str:
    return f"data:image/png;base64,{base64.b64encode(figure.png).decode()}"
