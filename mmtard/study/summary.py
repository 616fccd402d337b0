"""What a study found, on the console: its accuracies, and its sentences."""

from __future__ import annotations

from rich.table import Table

from ..evaluation.table import plain_console, print_table
from ..report.tables import Cell
from . import tables, verdict
from .findings import Findings


def show(found: Findings) -> None:
    """Print the accuracies at the tuned settings, the chance level, and what was found."""
    of = tables.accuracies(found)
    table = Table(title=of.caption)
    (_, *groups), (first, *columns) = of.head
    table.add_column(first[0])
    over = [name for name, span in groups for _ in range(span)]
    for name, (column, _) in zip(over, columns):
        table.add_column(f"{name} {column}", justify="right")
    for name, cells in of.rows:
        table.add_row(name, *map(_text, cells))
    print_table(table)
    console = plain_console(soft_wrap=True)
    for line in (*of.notes, *verdict.lines(found)):
        console.print(line)


def _text(cell: Cell) -> str:
    return cell.text
