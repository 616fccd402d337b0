"""A file of JSON lines that a run adds to, and cuts back to the step it goes on from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO

from ..errors import UserError
from ..files import why_not_written, write_text


class Journal:
    """Rows with a `step`, a line each, that are on the way to the disk as soon as they are added.

    Opening keeps the rows up to step `start`. `damaged`: how many lines of the earlier file were no rows, but for a
    last one that an interruption cut short. create: whether there is a file before the first row. Raises UserError
    where the file cannot be written.
    """

    def __init__(self, path: Path, start: int, create: bool = True):
        self.path, self._file = path, None
        try:
            self.damaged = cut(path, start)
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

    def close(self) -> None:
        """Bring every row to the disk."""
        if self._file is None:
            return
        try:
            os.fsync(self._file.fileno())
        except OSError:
            pass  # a disk that fails was told of by `append`, or will be by the next start
        self._file.close()

    def _open(self) -> IO[bytes]:
        if self._file is None:
            self._file = self.path.open("ab", buffering=0)
        return self._file


def cut(path: Path, step: int) -> int:
    """Keep the rows of a file up to `step`, and return how many damaged lines between them were left out.

    A last line that an interruption cut short goes, too, without being counted. Raises OSError.
    """
    if not path.exists():
        return 0
    content = path.read_bytes()
    lines = content.splitlines()
    rows = [_row(line) for line in lines]
    kept = [line for line, row in zip(lines, rows) if row is not None and row["step"] <= step]
    text = b"".join(line + b"\n" for line in kept)
    if text != content:
        write_text(path, text.decode("utf-8"))
    return sum(row is None for row in rows[:-1])


def _row(line: bytes) -> dict | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
