"""What a full disk, another that takes no file, or one that gives none, is told as."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
NO_FILE = (errno.EISDIR, errno.ENOTDIR, errno.ELOOP)  # something else lies in the place of a file or a folder


def why_not_read(path: Path, error: OSError) -> str:
    """Say why `path` could not be read, in the system's own words, and what to do where they tell it."""
    remedy = "; move it away" if error.errno in NO_FILE else ""
    if isinstance(error, PermissionError):
        remedy = "; correct its permissions"
    return f"'{path}' cannot be read: {error.strerror or error}{remedy}"


def why_not_written(path: Path, error: OSError, needed: int | None = None, remedy: str = "") -> str:
    """Say why `path` could not be written: which disk is full and how much is needed, or the system's own words.

    needed: bytes of what was to be written, where they are known. remedy: against any reason but a full disk.
    """
    reason = error.strerror or str(error)
    if error.errno not in FULL:
        return f"cannot write '{path}': {reason}" + (f"; {remedy}" if remedy else "")
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
