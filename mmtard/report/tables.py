"""The report's tables as rows of cells, ready for the page."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..config import parse_fraction
from .groups import LEFT_OUT_OF_MEANS, Group, difference, mean
from .records import Accuracy, Retrieval, Zeroshot
from .run_files import ReportSource


@dataclass(frozen=True)
class Cell:
    """`text` in large, `below` in small letters: an interval, or why there is nothing; `change`: to the first model."""

    text: str
    below: str = ""
    change: str = ""


@dataclass
class Table:
    """head: (text, columns it spans) of each of its rows. rows: a name and its cells. notes: under the table.

    name: of its files beside the page, without an ending; "" for a table that has none. words: its cells hold
    sentences, not numbers.
    """

    head: list[list[tuple[str, int]]]
    rows: list[tuple[str, list[Cell]]]
    caption: str = ""
    notes: list[str] = field(default_factory=list)
    name: str = ""
    words: bool = False


NONE = Cell("–")


def pivot(group: Group, sources: list[ReportSource], name: str = "") -> Table:
    """Put datasets down, models across: clean and robust accuracy, with differences to the first model shown."""
    shown = [i for i, model in enumerate(group.models) if model]
    measures = [None, *group.eps]
    head = [
        [("", 1), *((sources[i].name, len(measures)) for i in shown), ("", 1)],
        [("dataset", 1), *((_measure(e), 1) for _ in shown for e in measures), ("chance", 1)],
    ]
    rows = [(dataset, _dataset_row(group, shown, measures, dataset)) for dataset in group.datasets]
    if len(group.shared) > 1:
        rows.append((f"mean of {len(group.shared)}", _mean_row(group, shown, measures, group.shared)))
    without = [row for row in group.shared if group.models[shown[0]][row].name != LEFT_OUT_OF_MEANS]
    if without and without != group.shared:
        rows.append((f"mean without {LEFT_OUT_OF_MEANS}", _mean_row(group, shown, measures, without)))
    notes = _notes(group, shown, rows, sources)
    return Table(head, rows, group.title, notes, name)


def _notes(group: Group, shown: list[int], rows: list, sources: list[ReportSource]) -> list[str]:
    """How the table is to be read."""
    first = sources[shown[0]].name if shown else ""
    notes = ["In %; small: 95 % interval. Clean accuracy is of all samples, robust accuracy of those attacked."]
    notes += prompt_notes(group)
    if len(shown) > 1:
        notes.append(f"Δ: points above {first}; p: McNemar's test on the same samples.")
    if len(shown) > 1 and set(group.shared) != set(group.datasets):
        notes.append("Means are over the datasets that every model was measured on.")
    if any(cell.change.endswith("*") for _, cells in rows for cell in cells):
        notes.append("*: not the same samples, so no paired test.")
    return notes + [f"Not shown, an older evaluation of {text}." for text in group.older]


def prompt_notes(group: Group) -> list[str]:
    """Say with which prompts each row was asked."""
    several = len(group.prompts) > 1
    return [
        f"Prompts{f' of {_listed(rows)}' if several else ''}: {said_prompts(templates)}."
        for templates, rows in group.prompts.items()
    ]


def said_prompts(templates: tuple[str, ...] | list[str]) -> str:
    """Return the prompts in words: all of a few, else how many and the first."""
    quoted = [f"“{template}”" for template in templates]
    return ", ".join(quoted) if len(quoted) <= 3 else f"{len(quoted)}, the first {quoted[0]}"


def _listed(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:5])} and {len(names) - 5} more"


def _measure(eps: str | None) -> str:
    return "clean" if eps is None else f"eps {eps}"


def _dataset_row(group: Group, shown: list[int], measures: list, name: str) -> list[Cell]:
    cells, chance = [], "–"
    for i in shown:
        dataset = group.models[i].get(name)
        if dataset is None:
            cells += [NONE] * len(measures)
            continue
        chance = percent(dataset.chance)
        first = group.models[shown[0]].get(name)
        for eps in measures:
            value = dataset.clean_all if eps is None else dataset.eps[eps].robust if eps in dataset.eps else None
            compared = difference(first, dataset, eps) if value and first and i != shown[0] else None
            cells.append(NONE if value is None else Cell(percent(value.accuracy), interval(value), _change(compared)))
    return [*cells, Cell(chance)]


def _mean_row(group: Group, shown: list[int], measures: list, names: list[str]) -> list[Cell]:
    cells = []
    for i in shown:
        for eps in measures:
            value, first = (mean([group.models[j][name] for name in names], eps) for j in (i, shown[0]))
            compared = value is not None and first is not None and i != shown[0]
            change = f"Δ {100 * (value - first):+.1f}" if compared else ""
            cells.append(NONE if value is None else Cell(percent(value), change=change))
    return [*cells, Cell("")]


def _change(compared: dict | None) -> str:
    if compared is None:
        return ""
    points = f"Δ {100 * compared['difference']:+.1f}"
    if not compared["paired"]:
        return f"{points}*"
    return points if compared["p"] is None else f"{points}, p {compared['p']:.2g}"


def retrieval(group: Group, sources: list[ReportSource], name: str = "") -> Table:
    """Put recall at k of both directions in a row each; models across, with differences to the first."""
    shown = [i for i, model in enumerate(group.retrieval) if model]
    eps = sorted({e for model in group.retrieval for d in model.values() for e in d.eps}, key=parse_fraction)
    measures = [None, *eps]
    head = [
        [("", 1), *((sources[i].name, len(measures)) for i in shown)],
        [("dataset", 1), *((_measure(e), 1) for _ in shown for e in measures)],
    ]
    rows = []
    for dataset in dict.fromkeys(row for model in group.retrieval for row in model):
        asked = next(group.retrieval[i][dataset] for i in shown if dataset in group.retrieval[i])
        for direction, by_k in asked.clean_all.items():
            for k in by_k:
                found = [[_recall(group.retrieval[i].get(dataset), e, direction, k) for e in measures] for i in shown]
                cells = [
                    _recall_cell(value, found[0][j] if row else None)
                    for row, values in enumerate(found)
                    for j, value in enumerate(values)
                ]
                rows.append((f"{dataset}, {direction.replace('_', ' ')}, recall@{k}", cells))
    notes = [
        "In %; small: 95 % interval. Clean recall is among all samples, robust recall among those attacked: "
        "fewer candidates, so not one scale."
    ]
    return Table(head, rows, f"Retrieval, {group.title}", notes, name)


def _recall(dataset: Retrieval | None, eps: str | None, direction: str, k: str) -> Accuracy | None:
    if dataset is None or (eps is not None and eps not in dataset.eps):
        return None
    return (dataset.clean_all if eps is None else dataset.eps[eps].recall).get(direction, {}).get(k)


def _recall_cell(value: Accuracy | None, first: Accuracy | None) -> Cell:
    if value is None:
        return NONE
    change = f"Δ {100 * (value.accuracy - first.accuracy):+.1f}" if first else ""
    return Cell(percent(value.accuracy), interval(value), change)


def details(datasets: list[Zeroshot], caption: str) -> Table:
    """Show all of one evaluation: a row for each dataset and radius, what stands after each attack, the worst class."""
    attacks = list(dict.fromkeys(name for d in datasets for e in d.eps.values() for name in e.attacks))
    columns = ["dataset", "eps", "clean, all", "clean, same samples", *(f"after {name}" for name in attacks)]
    columns += ["robust", "worst class", "chance", "pixels"]
    rows = []
    for d in datasets:
        for eps, at in d.eps.items():
            after = [percent(at.attacks[name].accuracy) if name in at.attacks else "–" for name in attacks]
            worst = NONE
            if at.worst_class:
                worst = Cell(percent(at.worst_class.accuracy), f"{at.worst_class.name}, n {at.worst_class.n}")
            cells = [Cell(eps), accuracy(d.clean_all), accuracy(d.clean), *map(Cell, after), accuracy(at.robust)]
            cells += [worst, Cell(percent(d.chance)), Cell("x".join(map(str, d.perturbed_size)), d.perturb_at)]
            rows.append((d.name, cells))
    return Table([[(name, 1) for name in columns]], rows, caption)


def accuracy(value: Accuracy) -> Cell:
    """Return an accuracy in %, with its interval and number of samples."""
    return Cell(percent(value.accuracy), f"{interval(value)}, n {value.n}")


def percent(fraction: float) -> str:
    """Return a share in %, to a tenth."""
    return f"{100 * fraction:.1f}"


def interval(value: Accuracy) -> str:
    """Return a 95 % interval in %."""
    low, high = value.interval95
    return f"{100 * low:.1f}–{100 * high:.1f}"
