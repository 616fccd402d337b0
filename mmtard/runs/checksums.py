"""Checksums of the files of a run that decide its numbers and are no checkpoint: settings, class embeddings, start."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError
from ..files import write_text
from .layout import CHECKSUMS


@contextmanager
def renewed(run: Path, name: str) -> Iterator[None]:
    """Note the size and SHA-256 of a file of a run, or of all files in a folder of it, once the block has written it.

    Until then the file has no checksum, so that an interruption leaves none that does not fit. Raises OSError.
    """
    kept = {file: about for file, about in _known(run).items() if not _is_in(file, name)}
    _write(run, kept)
    yield
    _write(run, kept | {path.relative_to(run).as_posix(): describe(path) for path in _files(run / name)})


def why_damaged(run: Path, name: str) -> str | None:
    """Say which file of `name`, a file or folder of a run, is not as it was recorded; None when all are.

    What a run of an earlier version has no checksum of is not checked.
    """
    for file, expected in _known(run).items():
        if not _is_in(file, name):
            continue
        try:
            if describe(run / file) != expected:
                return f"'{run / file}' does not match its checksum in {CHECKSUMS}: it was changed or damaged"
        except OSError as error:
            return f"'{run / file}' cannot be read: {error.strerror}"
    return None


def verify(run: Path, name: str, remedy: str) -> None:
    """Raise UserError, ending with the `remedy`, when a file or folder of a run is not as it was recorded."""
    reason = why_damaged(run, name)
    if reason is not None:
        raise UserError(f"{reason}; {remedy}")


def describe(path: Path) -> dict:
    """The size and SHA-256 of a file, as manifests keep them. Raises OSError."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _is_in(file: str, name: str) -> bool:
    return file == name or file.startswith(f"{name}/")


def _write(run: Path, known: dict[str, dict]) -> None:
    write_text(run / CHECKSUMS, json.dumps({"files": known}, indent=1) + "\n")


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _known(run: Path) -> dict[str, dict]:
    try:
        known = json.loads((run / CHECKSUMS).read_bytes())["files"]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        known = None
    if not isinstance(known, dict) or any(".." in Path(file).parts or Path(file).is_absolute() for file in known):
        raise UserError(
            f"'{run / CHECKSUMS}' is damaged; remove it to go on without a check of the files that it lists"
        )
    return known
