"""The page: everything found of the given runs and models, in one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from .. import __version__
from ..errors import UserError
from ..runs import history
from . import accuracy, curves, sources, tables
from .attacked_images import Strip, strip
from .groups import Group, group
from .records import Check
from .sources import ReportSource
from .style import COLOURS, Figure

PAGE, TEMPLATE = "report.html", "page.html.j2"
STATUSES = ("FAIL", "WARN", "PASS")


@dataclass(frozen=True)
class Section:
    """A block of figures under its own heading; `note` says how to read them, `missing` why there are none."""

    title: str
    figures: list[Figure]
    missing: str
    note: str = ""


def report(paths: list[Path], out: Path, images: int = 6, command: str = "") -> Path:
    """Write OUT/report.html and its figures as PNGs beside it; the page's path.

    paths: run folders, or results.json files or folders of them. images: samples shown under attack for each model, 0 for none.
    Raises UserError for a path that is neither, and when OUT holds something else.
    """
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / PAGE).is_file())):
        raise UserError(f"'{out}' exists and is no report; choose another folder for --out")
    found = sources.read(paths)
    groups = group(found)
    strips = [strip(source, i, images) for i, source in enumerate(found)] if images else []
    sections = _sections(found, groups)
    figures = [f for block in sections.values() for section in block for f in section.figures]
    figures += [shown.figure for s in strips for shown in s.samples]
    page = _render(found, groups, sections, strips, command)
    _publish(out, page, figures)
    return out / PAGE


def _sections(found: list[ReportSource], groups: list[Group]) -> dict[str, list[Section]]:
    robustness = [section for n, g in enumerate(groups) for section in _of_group(g, n, found) if any(g.models)]
    trajectory = accuracy.trajectory(found)
    training = [
        ("Loss terms", curves.losses(found), "no run has a metrics.jsonl with a loss"),
        ("Teacher weights", curves.teacher_weights(found), "no method here weights its teachers by sample"),
        (
            "Accuracy during training",
            [*curves.probes(found), *([trajectory] if trajectory else [])],
            "no run has a probes.jsonl",
        ),
        ("Optimisation", curves.optimisation(found), "no run has a metrics.jsonl with a learning rate"),
        ("Throughput and memory", curves.speed(found), "no run has a metrics.jsonl with its speed"),
    ]
    return {"robustness": robustness, "training": [Section(*entry) for entry in training]}


def _of_group(g: Group, number: int, found: list[ReportSource]) -> list[Section]:
    marks = (
        "Large: mean over the model's datasets; small: each dataset."
        if any(len(model) > 1 for model in g.models)
        else ""
    )
    return [
        Section(
            "Clean against robust accuracy",
            accuracy.scatter(g, number, found),
            "no dataset was attacked",
            f"{g.title}. {marks} Dotted: nothing lost to the attack.",
        ),
        Section(
            "Accuracy against eps",
            accuracy.against_eps(g, number, found),
            "no dataset was attacked",
            f"{g.title}. Bars: 95 % interval; at 0 the clean accuracy of the attacked samples.",
        ),
    ]


def _render(found: list[ReportSource], groups: list[Group], sections: dict, strips: list[Strip], command: str) -> str:
    environment = Environment(
        loader=PackageLoader("mmtard.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"data_uri": _data_uri, "json": _json, "line": json.dumps, "how_it_ended": _how_it_ended}
    return environment.get_template(TEMPLATE).render(
        sources=[(source, COLOURS[i % len(COLOURS)]) for i, source in enumerate(found)],
        pivots=[
            *(tables.pivot(g, found) for g in groups if any(g.models)),
            *(tables.retrieval(g, found) for g in groups if any(g.retrieval)),
        ],
        details=[
            tables.details(evaluation.zeroshot, f"{source.name}: {evaluation.path}")
            for source in found
            for evaluation in reversed(source.evaluations)
            if evaluation.zeroshot
        ],
        health=_health(found),
        sections=sections,
        strips=strips,
        command=command,
        version=__version__,
        written=time.strftime("%Y-%m-%d %H:%M %Z"),
    )


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
    return f"{history.end_kind(start)}: {history.end_reason(start)}"


def _json(value) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False)


def _data_uri(figure: Figure) -> str:
    return f"data:image/png;base64,{base64.b64encode(figure.png).decode()}"


def _publish(out: Path, page: str, figures: list[Figure]) -> None:
    scratch = out.with_name(f".{out.name}.writing")
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        (scratch / PAGE).write_text(page, encoding="utf-8")
        for figure in figures:
            (scratch / f"{figure.name}.png").write_bytes(figure.png)
        shutil.rmtree(out, ignore_errors=True)
        scratch.rename(out)
    except OSError as error:
        raise UserError(
            f"--out: cannot write '{out}': {error.strerror or error}; free space or choose another folder"
        ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
