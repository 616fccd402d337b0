"""Folders that mmtard makes as a whole and may make again, because they are its own: a report, an exported model."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import UserError
from .files import refuse_special, why_not_written

SETTINGS = "settings.json"


def read_settings(folder: Path) -> dict | None:
    """What a published folder was made with; None where there is no `folder`. UserError for a folder not made here."""
    if not os.path.lexists(folder):
        return None
    try:
        return json.loads((folder / SETTINGS).read_text())
    except (OSError, ValueError, RecursionError):
        raise UserError(
            f"'{folder}' exists and was not made by mmtard: it has no {SETTINGS} that can be read; "
            "choose another folder, or move it away"
        ) from None


def is_kept(folder: Path, then: dict | None, now: dict) -> bool:
    """Whether a folder that models came of stays as it is; False where there is none, so that it is to be made.

    then, now: what it was made with, and would be made with. Raises UserError naming what of both differs. Another
    `source` is no difference, since the same images may lie elsewhere, nor is what another version did not note.
    """
    if then is None:
        return False
    if differ := _differing(then, now):
        raise UserError(
            f"'{folder}' was made with another {' and '.join(differ)} than it would be now, and runs or models came of "
            "it; name another folder with --out, or remove the study's 'runs' and 'models'"
        )
    if then.get("source") != now.get("source"):
        print(f"'{folder}' stays as it was made of '{then.get('source')}': runs or models came of it", flush=True)
    return True


def _differing(then: dict, now: dict) -> list[str]:
    def same(one: object, other: object) -> bool:
        both = isinstance(one, dict) and isinstance(other, dict)
        return not _differing(one, other) if both else one == other

    return [key for key in then if key in now and key != "source" and not same(then[key], now[key])]


@contextmanager
def publish_folder(folder: Path, settings: dict) -> Iterator[Path]:
    """Yields an empty folder that takes the place of `folder`, with `settings` in it, when the block ends well.

    Raises UserError for a folder that exists and holds no settings, so was not made here, and for one that cannot be
    written, such as on a full disk.
    """
    read_settings(folder)
    try:
        with _new_folder(folder) as scratch:
            yield scratch
            (scratch / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")
            while not _swap(scratch, folder):
                read_settings(folder)
    except OSError as error:
        # An error of a write names no file, and that of a file elsewhere, which the block reads, is another's to tell.
        if error.filename is not None and folder.parent.absolute() not in Path(error.filename).absolute().parents:
            raise
        raise UserError(why_not_written(folder, error, remedy="name another folder")) from None


MANIFEST = ".mmtard.json"
PARTIAL, OLD = ".partial", ".old"  # how the names of folders end that are being made, or taken away
TRIES = 20  # at a folder that other processes replace at the same moment
REMEDY = "choose another folder, or move what is yours out of it"


@contextmanager
def replace_folder(folder: Path, kind: str) -> Iterator[Path]:
    """Yields a new, empty folder that takes the place of `folder` when the block ends well.

    For folders that mmtard makes as a whole and may make again: a report, an exported model. `kind` says which
    ("report"). A manifest in the folder lists what mmtard wrote there, with checksums. UserError, before anything is
    written, where `folder` exists and is not mmtard's own: no manifest of this kind, a file that the manifest does not
    list, or one that was changed since. An empty folder may be taken. Where the block fails, the old folder stays and
    the new one is removed.
    """
    folder = Path(folder)
    check_replaceable(folder, kind)
    with _new_folder(folder) as scratch:
        yield scratch
        digests = {name: _digest(scratch / name) for name in _files_of(scratch)}
        listed = json.dumps({"made_by": "mmtard", "kind": kind, "files": digests}, indent=1)
        (scratch / MANIFEST).write_text(listed + "\n", encoding="utf-8")
        check_replaceable(folder, kind)
        while not _swap(scratch, folder):
            check_replaceable(folder, kind)


def check_replaceable(folder: Path, kind: str) -> None:
    """Raises UserError where `replace_folder` would remove something that mmtard did not make, or cannot look at it.

    A folder that another process puts in its place meanwhile is looked at anew.
    """
    for tries_left in reversed(range(TRIES)):
        seen = _identity(folder)
        try:
            return _check_own(folder, kind)
        except (UserError, OSError) as error:
            if tries_left and _identity(folder) != seen:
                continue
            if isinstance(error, UserError) or error.errno == errno.ENAMETOOLONG:
                raise
            reason = error.strerror or str(error)
        raise UserError(f"'{folder}' cannot be looked into ({reason}); {REMEDY}")


def _identity(folder: Path) -> int | None:
    try:
        return os.lstat(folder).st_ino
    except OSError:
        return None


def _check_own(folder: Path, kind: str) -> None:
    if folder.is_symlink():
        raise UserError(f"'{folder}' is a link, which mmtard does not replace; name the folder itself")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"'{folder}' exists and is not a folder; choose another name")
    if not any(folder.iterdir()):
        return
    try:
        made = json.loads((folder / MANIFEST).read_bytes() if (folder / MANIFEST).is_file() else "null")
        known = dict(made["files"]) if made["kind"] == kind and made["made_by"] == "mmtard" else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        known = None
    if known is None:
        raise UserError(f"'{folder}' exists and is not a {kind} that mmtard made; {REMEDY}")
    refuse_special(folder)
    foreign = sorted(set(_files_of(folder)) - known.keys() - {MANIFEST})
    if foreign:
        raise UserError(f"'{folder}' holds '{foreign[0]}', which mmtard did not write there; {REMEDY}")
    present = [name for name in known if os.path.lexists(folder / name)]
    changed = [name for name in present if _digest(folder / name) != known[name]]
    if changed:
        raise UserError(f"'{folder}' holds '{changed[0]}', which was changed since mmtard wrote it; {REMEDY}")


def _files_of(folder: Path) -> list[str]:
    """Every file and link below a folder, as paths relative to it; links are not followed.

    Raises OSError for a folder that cannot be listed.
    """

    def fail(error: OSError) -> None:
        raise error

    found = []
    for parent, folders, files in os.walk(folder, onerror=fail):
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
    scratch, handle = _locked_scratch(folder)
    try:
        umask = os.umask(0)
        os.umask(umask)
        scratch.chmod(0o777 & ~umask)  # mkdtemp makes it for its owner alone; the finished folder is like any other
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(handle)


def _locked_scratch(folder: Path) -> tuple[Path, int]:
    """(a new scratch folder, a handle that holds its lock).

    Until it is locked, a process that makes the same folder may take it for abandoned, and remove it.
    """
    while True:
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=PARTIAL, dir=folder.parent))
        try:
            handle = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        with suppress(OSError):  # a file system without locks, where nothing is ever taken for abandoned
            fcntl.flock(handle, fcntl.LOCK_SH)
        if scratch.exists():
            return scratch, handle
        os.close(handle)


def _remove_abandoned(folder: Path) -> None:
    """Remove the scratch folders of `folder` whose makers were killed; where there are no locks, all stay."""
    name = f".{glob.escape(folder.name)}.????????"  # as mkdtemp names them
    replaced = folder.parent.glob(f"{name}{OLD}") if folder.exists() else ()
    for scratch in (*folder.parent.glob(f"{name}{PARTIAL}"), *replaced):
        if scratch.is_symlink() or not scratch.is_dir():
            continue
        with suppress(OSError):
            handle = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(scratch, ignore_errors=True)
            finally:
                os.close(handle)


def _swap(scratch: Path, folder: Path) -> bool:
    """Put `scratch` in the place of `folder`; the old folder stays whole until the new one is there.

    False where another process has put a folder there at the same moment, which must be looked at first.
    """
    old = scratch.with_suffix(OLD)
    try:
        folder.rename(old)
    except FileNotFoundError:
        old = None
    try:
        scratch.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            if old:
                old.rename(folder)
            raise
    placed = not scratch.exists()
    if old:
        shutil.rmtree(old, ignore_errors=True)
    return placed
