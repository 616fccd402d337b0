"""Files that several processes share, and how anything is written: locks, write beside and rename, JSON lines that may end cut."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file `path` against every other process and thread of the node; the file is removed afterwards.

    Raises OSError where the lock file cannot be made or the file system has no locks.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            current = os.stat(path).st_ino == os.fstat(fd).st_ino
        except FileNotFoundError:
            current = False
        except OSError:
            os.close(fd)
            raise
        if current:
            break
        os.close(fd)  # the holder before us removed the file: what we locked is no longer what others will lock
    try:
        yield
    finally:
        Path(path).unlink(missing_ok=True)
        # Processes forked meanwhile share this lock and would keep it after close alone.
        fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def held(path: Path) -> bool:
    """Whether someone holds the lock file `path` now; False when a process that was killed left it."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(fd, fcntl.LOCK_UN)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)


@contextmanager
def publish(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends well, so that no one ever sees half a file.

    The temporary name is new: a file or link that someone left there is removed, never followed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file beside `path` and rename it there. Raises OSError; the old file then stays as it was."""
    with publish(Path(path)) as temporary, open(temporary, "x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_json_lines(path: Path) -> list[dict]:
    """The objects of a file of JSON lines, in order; [] where there is no file.

    A line that is not JSON is left out: the last one of a process that was killed, or one that was damaged since.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def settings_digest(settings: dict) -> str:
    """16 hex digits that change with any setting."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def slug(text: str) -> str:
    """The text as part of a file's name: 2/255 -> 2_255."""
    return re.sub(r"[^\w.+=-]+", "_", text)


SETTINGS = "settings.json"


def read_settings(folder: Path) -> dict | None:
    """What a published folder was made with; None where `folder` does not exist. Raises UserError for a folder not made here."""
    if not folder.exists():
        return None
    try:
        return json.loads((folder / SETTINGS).read_text())
    except (OSError, ValueError):
        raise UserError(
            f"'{folder}' exists and was not made by the quickstart; remove it or choose another folder"
        ) from None


@contextmanager
def publish_folder(folder: Path, settings: dict) -> Iterator[Path]:
    """Yields an empty folder that takes the place of `folder`, with `settings` in it, when the block ends without an exception."""
    read_settings(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    (partial / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
