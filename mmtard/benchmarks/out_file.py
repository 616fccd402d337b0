"""Where a benchmark writes: looked at before it measures, and never over a file of the user's own. No torch."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError
from ..files import FULL, temporary_files, why_not_written

MADE_WITH = "made_with"  # a key that every result has
TRACE = b'"schemaVersion"'  # near the beginning of a profile that torch wrote
LARGEST = 256 * 2**20  # bytes of a result; a larger file is none


def check_out(path: Path) -> None:
    """Raise UserError where a benchmark's result cannot be written, or would replace what is none."""
    _check(path, "--out", "result of mmtard bench", _is_result)


def check_trace(path: Path | None) -> None:
    """Raise UserError where a profile cannot be written, or would replace what is none."""
    if path is not None:
        _check(path, "--trace", "profile", _is_trace)


@contextmanager
def scratch_folder(parent: Path | None = None, flag: str = "TMPDIR") -> Iterator[Path]:
    """A folder for what a benchmark writes and removes; a disk that is full or takes nothing is one UserError."""
    where = parent or temporary_files()
    try:
        made = tempfile.TemporaryDirectory(prefix="mmtard-bench-", dir=where)
    except OSError as error:
        raise UserError(f"{flag}: {why_not_written(where, error)}; name another folder") from None
    with made as folder:
        try:
            yield Path(folder)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise UserError(f"{flag}: {why_not_written(where, error)}; or name another folder") from None


def _check(path: Path, flag: str, kind: str, is_one) -> None:
    if os.path.lexists(path) and not (path.is_file() and is_one(path)):
        raise UserError(f"{flag}: '{path}' is there and is no {kind}; name another file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{flag}: {why_not_written(path, error)}; name another file") from None


def _is_result(path: Path) -> bool:
    try:
        if path.stat().st_size > LARGEST:
            return False
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and MADE_WITH in content


def _is_trace(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return TRACE in file.read(200)
    except OSError:
        return False
