"""What a benchmark found: a table on the terminal, and a JSON file with the command and the versions that gave it."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ..errors import UserError
from ..files import write_text
from ..runs.environment import device_name, environment

WIDTH = 150  # columns, where the terminal has fewer: a table that is cut says nothing


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
        console = Console(highlight=False, width=max(WIDTH, Console().width))
        for table in self.tables:
            console.print(_rendered(table))
        for note in self.notes:
            console.print(note, markup=False, soft_wrap=True)
        self.write(path, device)
        console.print(f"written to {path}", markup=False)

    def write(self, path: Path, device: torch.device) -> None:
        """Write the numbers, tables and notes, with what they were measured with."""
        made_with = {**environment([socket.gethostname()]), "device": device_name(device)}
        tables = [{"title": t.title, "columns": t.columns, "rows": t.rows} for t in self.tables]
        content = {"made_with": made_with, **self.numbers, "tables": tables, "notes": self.notes}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(content, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"cannot write '{path}': {error.strerror}; name another file with --out") from None


def _rendered(table: BenchmarkTable) -> Table:
    rendered = Table(title=table.title, title_justify="left")
    for number, column in enumerate(table.columns):
        rendered.add_column(column, justify="right" if number else "left", no_wrap=bool(number))
    for row in table.rows:
        rendered.add_row(*row)
    return rendered
