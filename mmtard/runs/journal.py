"""A file of JSON lines that a run adds to, and cuts back to the step it goes on from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import IO

from ..errors import UserError
from ..files import why_not_written, write_text


class Journal:
    """Rows with a `step`, a line each, that are on the way to the disk as soon as they are added.

    Opening keeps the rows up to step `start`, and knows the `steps` of those. `damaged`: how many lines of the earlier
    file were no rows, but for a last one that an interruption cut short. create: whether there is a file before the
    first row. Raises UserError where the file cannot be written.
    """

    def __init__(self, path: Path, start: int, create: bool = True):
        self.path, self._file = path, None
        try:
            self.damaged, self.steps = cut(path, start)
            if create:
                self._open()
        except OSError as error:
            raise UserError(why_not_written(path, error)) from None

    def append(self, row: dict) -> None:
        """Add a row as a whole; where there is no room for it, none of it stays."""
        line, end = (json.dumps(row) + "\n").encode(), None
        try:
            file = self._open()
            end = file.seek(0, os.SEEK_END)
            written = 0
            while written < len(line):
                written += file.write(line[written:])
        except OSError as error:
            if end is not None:
                self._file.truncate(end)
            raise UserError(why_not_written(self.path, error)) from None

    def sync(self) -> None:
        """Bring every row to the disk. Any thread may ask, also while another one adds rows, or closes the file.

        Raises UserError where the disk fails: some file systems say only here that rows are lost.
        """
        if self._file is None:
            return
        try:
            os.fsync(self._file.fileno())
        except ValueError:  # of a file that is closed, and so is on the disk
            pass
        except OSError as error:
            raise UserError(why_not_written(self.path, error)) from None

    def close(self) -> None:
        """Bring every row to the disk, as far as it takes them, and take no more."""
        with suppress(UserError):  # a disk that fails was told of by `append`, or will be by the next start
            self.sync()
        if self._file is not None:
            self._file.close()

    def _open(self) -> IO[bytes]:
        if self._file is None:
            self._file = self.path.open("ab", buffering=0)
        return self._file


def cut(path: Path, step: int) -> tuple[int, list[int]]:
    """Keep the rows of a file up to `step`: (how many damaged lines between them were left out, the kept rows' steps).

    A last line that an interruption cut short goes, too, without being counted. Raises OSError.
    """
    if not path.exists():
        return 0, []
    content = path.read_bytes()
    lines = content.splitlines()
    rows = [_row(line) for line in lines]
    kept = [(line, row["step"]) for line, row in zip(lines, rows) if row is not None and row["step"] <= step]
    text = b"".join(line + b"\n" for line, _ in kept)
    if text != content:
        write_text(path, text.decode("utf-8"))
    return sum(row is None for row in rows[:-1]), [step for _, step in kept]


def missing(steps: Iterable[int], last: int) -> list[tuple[int, int]]:
    """The steps from 1 to `last` that are not among `steps`, as pairs of the first and the last of each gap."""
    there = [0, *sorted({step for step in steps if 0 < step <= last}), last + 1]
    return [(before + 1, after - 1) for before, after in pairwise(there) if after - before > 1]


def _row(line: bytes) -> dict | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
