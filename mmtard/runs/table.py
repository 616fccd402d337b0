"""The table of the runs below a folder, as `mmtard runs` prints it: for people in 80 columns, or as JSON."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..distributed.console import is_unread, printable
from ..errors import UserError
from .layout import HISTORY
from .survey import Row, find_runs

COLUMNS = ("run", "state", "step", "images/s", "left", "saved", "starts", "robust")
RIGHT = ("step", "images/s", "left", "starts", "robust")
LONGEST_REASON = 160  # characters, two lines of a console
UNITS = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))


def show(folder: Path, as_json: bool = False) -> None:
    """Print the table, and below it in short why a run ended and what its robustness was measured against.

    as_json: a list of objects instead, for programs, with reasons in full. Raises UserError where there is no folder,
    and no run below it.
    """
    if not folder.is_dir():
        raise UserError(f"'{folder}' is no folder; give the one that holds your run_dirs")
    rows = find_runs(folder)
    if not rows:
        raise UserError(f"no run below '{folder}'; give the folder that holds your run_dirs")
    if as_json:
        print(json.dumps([asdict(row) | {"run": str(row.run)} for row in rows]))
        return
    console = Console(highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in COLUMNS:
        right = column in RIGHT
        table.add_column(column, justify="right" if right else "left", overflow="fold", no_wrap=right)
    for row in rows:
        table.add_row(*map(_text, _cells(row, folder)))
    console.print(table)
    for row in rows:
        for note in _notes(row):
            console.print(_text(f"{_name(row, folder)}: {note}"), soft_wrap=True)


def watch(folder: Path, seconds: float, as_json: bool = False) -> None:
    """Print the table anew every so many seconds, until Ctrl-C or until nobody reads it any more."""
    console = Console()
    try:
        while not is_unread():
            console.clear()
            show(folder, as_json)
            time.sleep(seconds)
    except KeyboardInterrupt:
        pass


def _cells(row: Row, folder: Path) -> list[str]:
    return [
        _name(row, folder),
        row.state.partition(":")[0],
        f"{row.step}/{row.steps or '?'}",
        f"{row.images_per_s:.4g}" if row.images_per_s else "",
        _time(row.seconds_left) if row.seconds_left is not None else "",
        "" if row.checkpoint is None else f"{row.checkpoint} ({_time(row.checkpoint_age)} ago)",
        str(row.restarts + 1),
        row.robust.partition(" under ")[0] if row.robust else "",
    ]


def _notes(row: Row) -> list[str]:
    """What has no room in a cell: why the run is in its state, its robustness in full, damaged files."""
    state, _, reason = row.state.partition(": ")
    if state != "unreadable":  # which stands nowhere else
        reason = _shortened(reason)
    notes = [f"{state}: {reason}"] if reason else []
    return [*notes, *([row.robust] if row.robust else []), *row.damaged]


def _shortened(reason: str) -> str:
    """A reason's beginning and its end, where what to do stands; the whole is in the run's history."""
    reason = " ".join(reason.split())
    if len(reason) <= LONGEST_REASON:
        return reason
    more, end = f" ... (whole in {HISTORY}) ... ", reason[-50:]
    end = end.partition(" ")[2] or end  # from a whole word on
    return reason[: LONGEST_REASON - len(more) - len(end)].rstrip() + more + end


def _name(row: Row, folder: Path) -> str:
    return str(row.run.relative_to(folder)) if row.run != folder else row.run.resolve().name


def _text(cell: str) -> Text:
    """The cell as it stands: names and reasons of others are no markup."""
    return Text(printable(cell))


def _time(seconds: float) -> str:
    """`3d 4h`, `2h 10m`, `40s`: the two largest units."""
    left, parts = max(0, round(seconds)), []
    for unit, size in UNITS:
        if left >= size or (unit == "s" and not parts):
            parts.append(f"{left // size}{unit}")
            left %= size
        if len(parts) == 2:
            break
    return " ".join(parts)
