"""Files that several processes share, and how anything is written.

Locks; write beside and rename; what a full disk is told as; JSON lines that may end cut; digests.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from .errors import UserError

# What a file system without locks answers, such as Lustre mounted without flock.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
FULL = (errno.ENOSPC, errno.EDQUOT)
MOST_FOLDERS = 5000  # that are searched for what is no file
QUIET_S = 5.0  # how long a process waits for another one without a word


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file `path` against every other process and thread of the node; the file is removed afterwards.

    A wait that takes longer than a few seconds is told. On a file system without locks it guards nothing: what is
    written under it is published by rename, so that two writers cost work and no more. Raises OSError where the lock
    file cannot be made or is a link.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            _lock(fd, path)
            current = os.stat(path).st_ino == os.fstat(fd).st_ino
        except FileNotFoundError:
            current = False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(fd)
                raise
            current = True
        if current:
            break
        os.close(fd)  # The last holder deleted the lock file, so we locked a file nobody else can open. Try again.
    try:
        yield
    finally:
        Path(path).unlink(missing_ok=True)
        # Processes forked meanwhile share this lock and would keep it after close alone.
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def _lock(fd: int, path: Path) -> None:
    """Wait for the lock of an open file, and say so once where it takes long."""
    until = time.monotonic() + QUIET_S
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                break
            time.sleep(0.02)
    print(f"mmtard: another process works at '{path}'; waiting for its end", file=sys.stderr, flush=True)
    fcntl.flock(fd, fcntl.LOCK_EX)


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


def wait_for(path: Path, patience_s: float = 120.0) -> None:
    """Wait until a file or folder that another node has made is seen here. Raises UserError when it is not in time.

    A network file system may go on saying for a minute that a path is not there. To list the folder asks it anew.
    """
    until = time.monotonic() + patience_s
    while not path.exists():
        with suppress(OSError):
            os.listdir(path.parent)
        if time.monotonic() > until:
            raise UserError(
                f"'{path}' was made by the first rank, and is not seen on {socket.gethostname()} after "
                f"{patience_s:.0f} seconds; put run_dir on a file system that all nodes share"
            )
        time.sleep(0.2)


def discard(path: Path) -> None:
    """Remove a file, a folder with all in it, or a link itself, never what it points to; do nothing without one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def why_not_written(path: Path, error: OSError, needed: int | None = None) -> str:
    """Say why `path` could not be written: which disk is full and how much is needed, or the system's own words.

    needed: bytes of what was to be written, where they are known.
    """
    reason = error.strerror or str(error)
    if error.errno not in FULL:
        return f"cannot write '{path}': {reason}"
    wanted = f", {size_in_words(needed)} needed" if needed else ""
    return f"cannot write '{path}': {reason} ({free_space(path)}{wanted}); free space there, then start again"


def free_space(path: Path) -> str:
    """Say which disk a path is on, and how much of it is free."""
    folder = Path(os.path.abspath(path))
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    while not folder.is_mount():
        folder = folder.parent
    return f"the disk at '{folder}' has {size_in_words(free)} free"


def size_in_words(n_bytes: int) -> str:
    """`1.5 GiB`, `3.0 MiB`, `0.5 KiB`."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes / 2**10:.1f} KiB"


def refuse_special(folder: Path) -> None:
    """Raise UserError for a pipe, a device or a socket in a folder that others may have made, before any is opened.

    To read them may take for ever. What a link points to counts. Folders that cannot be listed are left to who reads
    them, and so is what lies in more folders than a run or a model has.
    """
    folders, looked_at = [str(folder)], 0
    while folders and looked_at < MOST_FOLDERS:
        looked_at += 1
        try:
            entries = list(os.scandir(folders.pop(0)))
        except OSError:
            continue
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            elif not entry.is_file(follow_symlinks=False):
                with suppress(OSError):
                    mode = os.stat(entry.path).st_mode
                    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                        raise UserError(f"'{entry.path}' is a pipe or a device, which no file here may be; remove it")


def read_json_lines(path: Path) -> list[dict]:
    """The objects of a file of JSON lines, in order; [] where there is no file.

    A line that is not JSON is left out: the last one of a process that was killed, or one that was damaged since.
    """
    try:
        return json_objects(Path(path).read_bytes().splitlines())
    except FileNotFoundError:
        return []


def json_objects(lines: Iterable[bytes]) -> list[dict]:
    """The objects that the lines are, in order; a line that is none is left out."""
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def settings_digest(settings: dict) -> str:
    """16 hex digits that change with any setting."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


DIGEST = "digest"


def sealed(record: dict) -> dict:
    """The record with a digest of all that is in it, as it reads once it was written as JSON."""
    return {**record, DIGEST: settings_digest(json.loads(json.dumps(record)))}


def opened(record: dict) -> tuple[dict, bool]:
    """(a record without its digest, whether that is right or there is none, as in files of earlier versions)."""
    content = {key: value for key, value in record.items() if key != DIGEST}
    return content, DIGEST not in record or record[DIGEST] == settings_digest(content)


def slug(text: str) -> str:
    """The text as part of a file's name: 2/255 -> 2_255."""
    return re.sub(r"[^\w.+=-]+", "_", text)
