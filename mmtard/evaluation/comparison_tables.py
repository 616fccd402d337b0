"""A comparison as tables: on the console, as CSV, as LaTeX."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

from rich.table import Table

from .compare import Mean, Row, distinct_names, means
from .matching import file_of
from .table import plain_console, print_table

CSV = (
    "dataset", "eps", "model", "runs", "n", "accuracy", "deviation", "difference", "low95", "high95", "only_first",
    "only_this", "mcnemar_p", "results",
)  # fmt: skip
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {character: f"\\{character}" for character in "&%$#_{}"}


def show(rows: list[Row]) -> None:
    """Print every model's accuracy and its difference from the first, and the means over the runs of one label."""
    first, names = rows[0].label, _dataset_names(rows)
    table = _table(f"accuracy in %, and its difference from {first} in points")
    columns = ("accuracy %", f"minus {first} (95 % interval)", f"only {first} right", "only it right", "McNemar p")
    _columns(table, ("dataset", "eps", "model"), columns)
    for row in rows:
        where = (names[row.dataset, row.against], row.eps or "clean") if row.difference is None else ("", "")
        table.add_row(*where, row.label, _percent(row.accuracy), *_differs(row.difference))
    print_table(table)
    if found := means(rows):
        table = _table("means over the runs of one label, with the standard deviation of a run")
        _columns(table, ("dataset", "eps", "model"), ("runs", "accuracy %"))
        for mean in found:
            where = names[mean.dataset, mean.against], mean.eps or "clean"
            table.add_row(*where, mean.label, str(mean.runs), _with_deviation(mean))
        print_table(table)
    files = dict.fromkeys((row.label, str(row.path)) for row in rows)
    for label, path in files:
        plain_console(soft_wrap=True).print(f"{label}: {path}")


def as_csv(rows: list[Row]) -> str:
    """A line for each model, dataset and eps, then one for each mean; shares, not percents. eps is empty for clean."""
    out, names = io.StringIO(), _dataset_names(rows)
    writer = csv.DictWriter(out, CSV, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        cells = {"dataset": names[row.dataset, row.against], "eps": row.eps, "model": row.label, "runs": 1}
        cells |= {"n": row.n, "accuracy": row.accuracy, "results": row.path}
        if (d := row.difference) is not None:
            low, high = d["interval95"]
            cells |= {"difference": d["difference"], "low95": low, "high95": high, "mcnemar_p": d["p"]}
            cells |= {"only_first": d["only_a"], "only_this": d["only_b"]}
        writer.writerow(cells)
    for mean in means(rows):
        cells = {"dataset": names[mean.dataset, mean.against], "eps": mean.eps, "model": mean.label}
        writer.writerow(cells | {"runs": mean.runs, "accuracy": mean.accuracy, "deviation": mean.deviation})
    return out.getvalue()


def as_latex(rows: list[Row]) -> str:
    """A `tabular` of booktabs: a row for each label, a column for each dataset, evaluation and eps, in percent.

    Several runs of one label give mean and deviation; a star marks a single run that differs from the first with
    McNemar's p below 0.05.
    """
    columns = list(dict.fromkeys(row.column for row in rows))
    averaged, names = {(m.dataset, m.eps, m.against, m.label): m for m in means(rows)}, _dataset_names(rows)
    heads = [_escape(f"{names[dataset, against]} {eps or 'clean'}") for dataset, eps, against in columns]
    lines = [
        f"% accuracy in %; *: differs from {_escape(rows[0].label)} with McNemar's p < 0.05",
        r"% needs \usepackage{booktabs}",
        rf"\begin{{tabular}}{{l{'r' * len(columns)}}}",
        r"\toprule",
        " & ".join(["", *heads]) + r" \\",
        r"\midrule",
    ]
    for label in dict.fromkeys(row.label for row in rows):
        cells = [_cell([r for r in rows if (r.column, r.label) == (at, label)], averaged) for at in columns]
        lines.append(" & ".join([_escape(label), *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _dataset_names(rows: list[Row]) -> dict[tuple[str, Path], str]:
    """(dataset, the first model's results) -> its name, with the evaluation's folder where several measured it."""
    measured: dict[str, dict[Path, None]] = {}
    for row in rows:
        measured.setdefault(row.dataset, {})[row.against] = None
    names = {}
    for dataset, files in measured.items():
        folders = distinct_names([file_of(file).parent for file in files])
        for file, folder in zip(files, folders):
            names[dataset, file] = dataset if len(files) == 1 else f"{dataset} ({folder})"
    return names


def _cell(rows: list[Row], averaged: dict[tuple, Mean]) -> str:
    if not rows:
        return "--"
    mean = averaged.get((*rows[0].column, rows[0].label))
    if mean is not None and mean.runs > 1:
        return rf"{_percent(mean.accuracy)} $\pm$ {_percent(mean.deviation)}"
    difference = rows[0].difference
    star = r"$^{*}$" if difference is not None and difference["p"] < 0.05 else ""
    return _percent(rows[0].accuracy) + star


def _differs(difference: dict | None) -> list[str]:
    if difference is None:
        return [""] * 4
    low, high = difference["interval95"]
    interval = f"{100 * difference['difference']:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"
    return [interval, str(difference["only_a"]), str(difference["only_b"]), f"{difference['p']:.3g}"]


def _with_deviation(mean: Mean) -> str:
    return _percent(mean.accuracy) + (f" +- {_percent(mean.deviation)}" if mean.runs > 1 else "")


def _escape(text: str) -> str:
    return re.sub(r"[\\~^&%$#_{}]", lambda match: _LATEX[match[0]], " ".join(text.split()))


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _table(title: str) -> Table:
    return Table(title=title)


def _columns(table: Table, names: tuple[str, ...], numbers: tuple[str, ...]) -> None:
    for name in names:
        table.add_column(name)
    for number in numbers:
        table.add_column(number, justify="right")
