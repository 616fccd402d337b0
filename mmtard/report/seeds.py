"""Runs that differ in their seed alone: the mean over them and how far they spread."""

from __future__ import annotations

import json
import re
import statistics

from ..config.yaml_tree import check_tree, parse
from ..errors import UserError
from .groups import Group, mean
from .run_files import ReportSource
from .tables import NONE, Cell, Table

# What may differ between two seeds of one training.
FREE = ("seed", "run_dir", "resume", "log", "probe", "checkpoint")


def families(sources: list[ReportSource]) -> list[list[int]]:
    """Return the places of the sources that are trainings of one configuration under two seeds or more."""
    found: dict[str, dict[object, int]] = {}
    for i, source in enumerate(sources):
        settings = _settings(source)
        if settings is not None and source.evaluations:
            key = json.dumps({k: v for k, v in settings.items() if k not in FREE}, sort_keys=True, default=str)
            found.setdefault(key, {}).setdefault(json.dumps(settings.get("seed"), default=str), i)
    return [list(by_seed.values()) for by_seed in found.values() if len(by_seed) > 1]


def _settings(source: ReportSource) -> dict | None:
    """The settings that a run stored; None for a text that is none, or one that would take for ever to lay out."""
    try:
        found = parse(source.config or "")
        check_tree(found, "its configuration")
    except (ValueError, UserError):
        return None
    return found if isinstance(found, dict) else None


def means(group: Group, sources: list[ReportSource], name: str) -> Table | None:
    """Show mean and standard deviation over seeds, datasets down, trainings across; None where there is one seed each.

    The standard deviation is that of a sample (n - 1), in points. Only seeds that were measured on a dataset count.
    """
    trained = [[i for i in family if group.models[i]] for family in families(sources)]
    trained = [family for family in trained if len(family) > 1]
    if not trained:
        return None
    measures = [None, *group.eps]
    head = [
        [("", 1), *((_family_name(family, sources), len(measures)) for family in trained)],
        [("dataset", 1), *(("clean" if e is None else f"eps {e}", 1) for _ in trained for e in measures)],
    ]
    rows = [
        (dataset, [_cell(group, family, [dataset], eps) for family in trained for eps in measures])
        for dataset in group.datasets
    ]
    if len(group.shared) > 1:
        cells = [_cell(group, family, group.shared, eps) for family in trained for eps in measures]
        rows.append((f"mean of {len(group.shared)}", cells))
    notes = ["In %; ±: standard deviation over seeds, n - 1 in its denominator; small: how many seeds."]
    return Table(head, rows, f"Means over seeds, {group.title}", notes, name)


def _cell(group: Group, family: list[int], datasets: list[str], eps: str | None) -> Cell:
    values = []
    for i in family:
        if all(dataset in group.models[i] for dataset in datasets):
            value = mean([group.models[i][dataset] for dataset in datasets], eps)
            values += [] if value is None else [100 * value]
    if len(values) < 2:
        return NONE
    return Cell(f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}", f"{len(values)} seeds")


def _family_name(family: list[int], sources: list[ReportSource]) -> str:
    """What the runs' names begin with alike, without the word seed; else the first name."""
    names = [sources[i].name for i in family]
    common = next(
        (names[0][:n] for n in range(len(names[0]), 0, -1) if all(o.startswith(names[0][:n]) for o in names)), ""
    )
    return re.sub(r"[-_ /.]*(seed|s)?[-_ =/.]*$", "", common) or names[0]
