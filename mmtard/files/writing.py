"""How anything is written: beside its place and renamed to it, so that no one ever sees half a file."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from .disk import FULL


@contextmanager
def publish(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends well, so that no one ever sees half a file.

    The temporary name is new and cannot be guessed, so nobody can leave a link there that the writing would follow.
    A link at `path` itself is replaced by the file; what it points at stays as it is.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, sync: bool = True) -> None:
    """Write a whole text file beside `path` and rename it there. Raises OSError; the old file then stays as it was.

    sync: wait until the disk has it.
    """
    with publish(Path(path)) as temporary, open(temporary, "x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        if sync:
            os.fsync(file.fileno())


def note_text(path: Path, text: str, sync: bool = True) -> None:
    """Write a small text file as `write_text` does, and over the old one in place where the disk has no room for both.

    For what must be told of a full disk itself. A file keeps its blocks, so a text that is little longer still fits.
    Raises OSError; the old file then stays as it was.
    """
    try:
        return write_text(path, text, sync)
    except OSError as error:
        if error.errno not in FULL:
            raise
        full = error
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        raise full from None
    with os.fdopen(fd, "r+b", buffering=0) as file:
        if os.fstat(fd).st_nlink != 1:
            raise full  # a second name, which someone gave it, would show the text, too
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)  # two ranks may have the same to tell
        old = file.read()
        try:
            _overwrite(file, text.encode("utf-8"))
        except OSError:
            _overwrite(file, old)
            raise full from None


def _overwrite(file: IO[bytes], content: bytes) -> None:
    file.seek(0)
    written = 0
    while written < len(content):
        written += file.write(content[written:])
    file.truncate()
