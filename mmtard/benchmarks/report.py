"""What a benchmark found: a table on the terminal, and a JSON file with the command and the versions that gave it."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import UserError
from ..files import why_not_written, write_text
from ..runs.environment import device_name, environment
from .out_file import MADE_WITH

WIDTH = 150  # columns, or as many as the numbers need, where the terminal has fewer: a table that is cut says nothing
UNBOUNDED = 10_000
NAME_WIDTH = 30  # the least that names are broken to


@dataclass
class BenchmarkTable:
    """One table of a benchmark: a title, the columns' names, and rows of as many cells, the first one a name."""

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)


@dataclass
class BenchmarkReport:
    """All that a benchmark found.

    tables: for the reader. numbers: the same and more, as JSON keeps them. notes: sentences under the tables.
    """

    tables: list[BenchmarkTable] = field(default_factory=list)
    numbers: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def publish(self, path: Path, device: torch.device) -> None:
        """Print the tables and write everything to `path`. UserError where it cannot be written."""
        tables, ruler = [_rendered(table) for table in self.tables], Console(width=UNBOUNDED)
        needed = max((ruler.measure(table).minimum for table in tables), default=0)
        console = Console(highlight=False, width=max(WIDTH, Console().width, needed))
        for table in tables:
            console.print(table)
        for note in self.notes:
            console.print(note, markup=False, soft_wrap=True)
        self.write(path, device)
        console.print(f"written to {path}", markup=False)

    def write(self, path: Path, device: torch.device) -> None:
        """Write the numbers, tables and notes, with what they were measured with."""
        made_with = {**environment([socket.gethostname()]), "device": device_name(device)}
        tables = [{"title": t.title, "columns": t.columns, "rows": t.rows} for t in self.tables]
        content = {MADE_WITH: made_with, **self.numbers, "tables": tables, "notes": self.notes}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(content, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"--out: {why_not_written(path, error)}; name another file") from None


def _rendered(table: BenchmarkTable) -> Table:
    # Names of models and files are others' text, of which rich would take [brackets] for markup.
    rendered = Table(title=Text(table.title), title_justify="left")
    for number, column in enumerate(table.columns):
        if number:
            rendered.add_column(Text(column), justify="right", no_wrap=True)
        else:
            rendered.add_column(Text(column), min_width=NAME_WIDTH)
    for row in table.rows:
        rendered.add_row(*map(Text, row))
    return rendered
