"""The report's tables as files that a spreadsheet and a paper take: CSV and LaTeX (booktabs)."""

from __future__ import annotations

import csv
import io

from .shown import csv_cell, latex
from .tables import Table


def as_csv(table: Table) -> str:
    """Write a row for each cell: row, model, measure, value, interval, change."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    *above, measures = _columns(table)
    writer.writerow(["row", *(["model"] if above else []), "measure", "value", "interval 95 %", "change"])
    for name, cells in table.rows:
        for i, cell in enumerate(cells):
            over = [above[0][i]] if above else []
            texts = [name, *over, measures[i], cell.text, cell.below, cell.change]
            writer.writerow([csv_cell(text) for text in texts])
    return out.getvalue()


def as_latex(table: Table) -> str:
    """Write a tabular for the package booktabs, the caption and the notes as comments.

    What stands in small letters, such as intervals, is a line of its own below its row.
    """
    head = [
        " & ".join(latex(text) if span == 1 else rf"\multicolumn{{{span}}}{{c}}{{{latex(text)}}}" for text, span in row)
        for row in table.head
    ]
    body = []
    for name, cells in table.rows:
        body.append(" & ".join(map(latex, (name, *(cell.text for cell in cells)))))
        if any(cell.below for cell in cells):
            small = [rf"\scriptsize {latex(cell.below)}" if cell.below else "" for cell in cells]
            body.append(" & ".join(["", *small]))
    width = 1 + max((len(cells) for _, cells in table.rows), default=0)
    lines = [f"% {latex(text)}" for text in (table.caption, *table.notes)]
    lines += [rf"\begin{{tabular}}{{l{'r' * (width - 1)}}}", r"\toprule"]
    lines += [rf"{row} \\" for row in head] + [r"\midrule"] + [rf"{row} \\" for row in body]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _columns(table: Table) -> list[list[str]]:
    """The heads over each cell, a list a row of heads; the first column, over the rows' names, is left out."""
    return [[text for text, span in row for _ in range(span)][1:] for row in table.head]
