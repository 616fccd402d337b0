"""The user's cache folder, and paths as others leave them: not seen yet, to be removed, a pipe in place of a file."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from ..errors import UserError

MOST_FOLDERS = 5000  # that are searched for what is no file


def user_cache() -> Path:
    """The folder of mmtard in the user's cache folder (XDG Base Directory Specification)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmtard"


def temporary_files() -> Path:
    """The folder for temporary files. Raises UserError where none, or not the one that TMPDIR names, can be written."""
    named = os.environ.get("TMPDIR")
    try:
        found = tempfile.gettempdir()
    except OSError as error:
        raise UserError(f"TMPDIR: {error.strerror}; name a folder that can be written") from None
    if named and not (os.path.isdir(named) and os.path.samefile(found, named)):
        raise UserError(f"TMPDIR: cannot write '{named}'; name a folder that can be written")
    return Path(found)


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
