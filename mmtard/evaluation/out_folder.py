"""OUT of an evaluation, where others may work at the same time: each dataset is measured by one of them."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ..errors import UserError
from ..files import exclusive, slug
from . import results
from .partial_results import FOLDER

PATIENCE_S = 5.0  # the evaluation before this one may be at its end
NODE_PATIENCE_S = 60.0  # one that was lost with its node may leave the file system a while to notice
TRIES = 20  # at a folder that other evaluations remove at the same moment
PUBLISHING = f".{results.FILE}.lock"


@contextmanager
def hold(out: Path, names: Sequence[str]) -> Iterator[None]:
    """Keep other evaluations from measuring these datasets into OUT; those of other datasets may work there.

    All are taken at once, so that nothing is measured in vain. Folders that were made for it and hold nothing
    afterwards are removed. Raises UserError naming the dataset that another evaluation holds, and who that is.
    """
    folder = out / FOLDER
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    with ExitStack() as held:
        held.callback(_remove_empty, list(dict.fromkeys([folder, *missing])))
        for stem, name in sorted({slug(name): name for name in names}.items()):
            _take(held, out, folder / f"{stem}.lock", name)
        yield


def _take(held: ExitStack, out: Path, path: Path, name: str) -> None:
    patience = PATIENCE_S
    for _ in range(TRIES):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(exclusive(path, patience=patience))
        except FileNotFoundError:
            continue  # an evaluation that ended just now has removed the folder
        except BlockingIOError:
            if patience == PATIENCE_S and not _owner(path).startswith(f"{socket.gethostname()} "):
                patience = NODE_PATIENCE_S
                told = f"mmtard: --out: {name} is being measured into '{out}' by {_owner(path)}; waiting up to"
                print(f"{told} {patience:.0f} s for its end", file=sys.stderr, flush=True)
                continue
            raise UserError(
                f"--out: {name} is being measured into '{out}' by {_owner(path)}; "
                "wait for it to end, end it, or choose another folder"
            ) from None
        except OSError:
            return  # finished results can be read where nothing can be written; what must be written is told later
        with suppress(OSError):  # who holds it is for the eye
            path.write_text(f"{socket.gethostname()} process {os.getpid()}")
        return


def _owner(path: Path) -> str:
    """Who says in the lock file that it holds it."""
    try:
        return path.read_text(errors="replace").strip() or "another process"
    except OSError:
        return "another process"


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # it holds something
            folder.rmdir()


@contextmanager
def publishing(out: Path) -> Iterator[None]:
    """Keep other evaluations from writing OUT/results.json: what is read within is what will be replaced.

    Raises UserError where OUT cannot be written.
    """
    with ExitStack() as held:
        try:
            out.mkdir(parents=True, exist_ok=True)
            held.enter_context(exclusive(out / PUBLISHING))
        except OSError as error:
            raise results.not_written(out / results.FILE, error) from None
        yield
