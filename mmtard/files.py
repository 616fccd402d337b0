"""Files that several processes share, and how anything is written.

Locks; write beside and rename; folders that mmtard may replace because they are its own; JSON lines that may end cut.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from .errors import UserError

# What a file system without locks answers, such as Lustre mounted without flock.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
FULL = (errno.ENOSPC, errno.EDQUOT)
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


SETTINGS = "settings.json"


def read_settings(folder: Path) -> dict | None:
    """What a published folder was made with; None where there is no `folder`. UserError for a folder not made here."""
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
    """Yields an empty folder that takes the place of `folder`, with `settings` in it, when the block ends well.

    Raises UserError for a folder that exists and holds no settings, so was not made here.
    """
    read_settings(folder)
    with _new_folder(folder) as scratch:
        yield scratch
        (scratch / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")
        _swap(scratch, folder)


MANIFEST = ".mmtard.json"
PARTIAL = ".partial"  # how the names of folders end that are being made


@contextmanager
def replace_folder(folder: Path, kind: str, earlier: Callable[[Path], bool] = lambda _: False) -> Iterator[Path]:
    """Yields a new, empty folder that takes the place of `folder` when the block ends well.

    For folders that mmtard makes as a whole and may make again: a report, an exported model. `kind` says which
    ("report"). A manifest in the folder lists what mmtard wrote there, with checksums. UserError, before anything is
    written, where `folder` exists and is not mmtard's own: no manifest of this kind, a file that the manifest does not
    list, or one that was changed since. An empty folder may be taken. `earlier` says whether a folder without a
    manifest was made by a version that wrote none. Where the block fails, the old folder stays and the new one is
    removed.
    """
    folder = Path(folder)
    check_replaceable(folder, kind, earlier)
    with _new_folder(folder) as scratch:
        yield scratch
        digests = {name: _digest(scratch / name) for name in _files_of(scratch)}
        listed = json.dumps({"made_by": "mmtard", "kind": kind, "files": digests}, indent=1)
        (scratch / MANIFEST).write_text(listed + "\n", encoding="utf-8")
        check_replaceable(folder, kind, earlier)
        _swap(scratch, folder)


def check_replaceable(folder: Path, kind: str, earlier: Callable[[Path], bool] = lambda _: False) -> None:
    """Raises UserError where `replace_folder` would remove something that mmtard did not make."""
    remedy = "choose another folder, or move what is yours out of it"
    if folder.is_symlink():
        raise UserError(f"'{folder}' is a link, which mmtard does not replace; name the folder itself")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"'{folder}' exists and is not a folder; choose another name")
    if not any(folder.iterdir()):
        return
    try:
        made = json.loads((folder / MANIFEST).read_bytes())
        known = dict(made["files"]) if made["kind"] == kind and made["made_by"] == "mmtard" else None
    except (OSError, ValueError, KeyError, TypeError):
        known = None
    if known is None:
        if (folder / MANIFEST).exists() or not earlier(folder):
            raise UserError(f"'{folder}' exists and is not a {kind} that mmtard made; {remedy}")
        return
    foreign = sorted(set(_files_of(folder)) - known.keys() - {MANIFEST})
    if foreign:
        raise UserError(f"'{folder}' holds '{foreign[0]}', which mmtard did not write there; {remedy}")
    present = [name for name in known if os.path.lexists(folder / name)]
    changed = [name for name in present if _digest(folder / name) != known[name]]
    if changed:
        raise UserError(f"'{folder}' holds '{changed[0]}', which was changed since mmtard wrote it; {remedy}")


def _files_of(folder: Path) -> list[str]:
    """Every file and link below a folder, as paths relative to it; links are not followed."""
    found = []
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        found += [os.path.relpath(os.path.join(parent, name), folder) for name in files + links]
    return sorted(found)


def _digest(path: Path) -> str:
    """The sha256 of a file; what a link points to does not count."""
    if path.is_symlink() or not path.is_file():
        return "no file"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder`, made new under a name nobody can guess; removed afterwards if it is still there.

    What a process that was killed has left of such a folder is removed first: its lock is free.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=PARTIAL, dir=folder.parent))
    handle = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        umask = os.umask(0)
        os.umask(umask)
        scratch.chmod(0o777 & ~umask)  # mkdtemp makes it for its owner alone; the finished folder is like any other
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(handle)


def _remove_abandoned(folder: Path) -> None:
    """Remove the scratch folders of `folder` whose makers were killed; where there are no locks, all stay."""
    for scratch in folder.parent.glob(f".{glob.escape(folder.name)}.*{PARTIAL}"):
        if scratch.is_symlink() or not scratch.is_dir():
            continue
        with suppress(OSError):
            handle = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(scratch, ignore_errors=True)
            finally:
                os.close(handle)


def _swap(scratch: Path, folder: Path) -> None:
    """Put `scratch` in the place of `folder`; the old folder stays whole until the new one is there."""
    if folder.exists():
        old = scratch.with_suffix(".old")
        folder.rename(old)
        try:
            scratch.rename(folder)
        except OSError:
            old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        scratch.rename(folder)
