"""A folder that mmtard writes as a whole, and may replace only while it holds what mmtard wrote and nothing else.

`.mmtard-files.json` in the folder lists its files with their sizes and checksums. Whoever adds or edits a file makes
the folder their own, and it stays as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError

LIST = ".mmtard-files.json"
NAMED = 3  # files that a message names


@contextmanager
def output_folder(out: Path, kind: str, remedy: str) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `out` when the block ends well; on an error `out` stays as it was.

    The folder lies beside `out` under a name that nobody had. kind: what mmtard calls it, such as "report". Raises
    UserError when `out` holds what mmtard did not write, with the remedy, and in one line when the disk is full.
    """
    out = out.resolve()
    check_own(out, kind, remedy)
    scratch = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(out)
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".writing", dir=out.parent))
        scratch.chmod(0o777 & ~_umask())
        _write_list(scratch, kind)
        yield scratch
        _write_list(scratch, kind)
        check_own(out, kind, remedy)  # again: writing takes minutes
        _replace(out, scratch)
    except OSError as error:
        raise UserError(f"cannot write '{out}': {error.strerror or error}{_free(out)}; {remedy}") from None
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def check_own(out: Path, kind: str, remedy: str) -> None:
    """Raise UserError unless `out` is new, an empty folder, or holds exactly what mmtard wrote there."""
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir():
        raise UserError(f"'{out}' exists and is no {kind} of mmtard; {remedy}")
    present = _files(out)
    if not present and not any(out.iterdir()):
        return
    written = _read_list(out, kind)
    if written is None:
        raise UserError(f"'{out}' exists and is no {kind} of mmtard; {remedy}")
    others = sorted(present.keys() - written.keys() - {LIST})
    others += sorted(name for name in present.keys() & written.keys() if _description(present[name]) != written[name])
    if others:
        more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
        raise UserError(f"'{out}' holds files that mmtard did not write ({', '.join(others[:NAMED])}{more}); {remedy}")


def _files(folder: Path) -> dict[str, Path]:
    """Everything below a folder that is no folder, and empty folders, by name."""
    paths = (Path(at) / name for at, below, files in os.walk(folder) for name in (*files, *_leaves(Path(at), below)))
    return {str(path.relative_to(folder)): path for path in paths}


def _leaves(at: Path, below: list[str]) -> list[str]:
    return [name for name in below if (at / name).is_symlink() or not any((at / name).iterdir())]


def _description(path: Path) -> list:
    if path.is_symlink() or not path.is_file():
        return ["no file", ""]
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _write_list(folder: Path, kind: str) -> None:
    files = {name: _description(path) for name, path in sorted(_files(folder).items()) if name != LIST}
    content = {"kind": kind, "files": files, "writer": [socket.gethostname(), os.getpid()]}
    (folder / LIST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _read_list(folder: Path, kind: str) -> dict[str, list] | None:
    """The files that mmtard listed; None where it wrote no folder of this kind here."""
    try:
        found = json.loads((folder / LIST).read_text(encoding="utf-8"))
        return dict(found["files"]) if found["kind"] == kind else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _replace(out: Path, scratch: Path) -> None:
    """Put `scratch` in the place of `out`. Between the two renames `out` is not there; nothing is lost."""
    if not out.exists():
        scratch.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".replaced", dir=out.parent))
    try:
        out.rename(old / out.name)
        scratch.rename(out)
    finally:
        if not out.exists() and (old / out.name).exists():
            (old / out.name).rename(out)
        shutil.rmtree(old, ignore_errors=True)


def _remove_leftovers(out: Path) -> None:
    """Remove the scratch folders for `out` whose process on this machine was killed."""
    for path in out.parent.glob(f".{_literal(out.name)}.*.writing"):
        try:
            host, pid = json.loads((path / LIST).read_text(encoding="utf-8"))["writer"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if host == socket.gethostname() and not path.is_symlink() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(path, ignore_errors=True)


def _literal(name: str) -> str:
    """The name as a pattern that matches itself alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _free(out: Path) -> str:
    """How much room the disk has, where that can be known."""
    folder = next((path for path in out.parents if path.is_dir()), None)
    try:
        return f" ({shutil.disk_usage(folder).free / 2**20:,.0f} MiB free there)" if folder else ""
    except OSError:
        return ""
