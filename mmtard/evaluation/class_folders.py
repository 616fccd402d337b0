"""Images in class folders, read from shards that are written into the user's cache folder the first time."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

from ..data.shard_writer import RECORD, is_whole, write_shards
from ..errors import UserError
from ..files import exclusive, shared, user_cache
from .datasets import DatasetSource

TRIES = 2  # at writing shards: another evaluation may remove them before they are held
UNUSED_S = 24 * 3600.0  # shards of earlier contents that no evaluation used for so long are removed


def with_shards(source: DatasetSource, say, held: ExitStack | None = None) -> DatasetSource:
    """The source with shards to read: those of class folders are written into the cache folder first.

    The shards' folder is named by where the images lie and by what identifies every file: a folder that changed since
    is read anew, whatever kept its name and size. held: as long as it is open nobody removes the shards, however long
    they are read; without it they stay for a day. Raises UserError where they do not become whole, such as with a
    stranger's shard among them.
    """
    if source.folder is None:
        return source
    cache = user_cache()
    place = hashlib.sha256(str(source.folder.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    shards = cache / f"shards-{place}-{_content(source)}"
    if not shards.exists():
        changed = " anew, for they changed" if any(cache.glob(f"shards-{place}-*")) else " the first time"
        say(f"{source.name}: '{source.folder}' is read from shards, which are written to '{shards}'{changed}")
    for _ in range(TRIES):
        if not is_whole(shards):
            write_shards(source.folder, shards, classnames=_names(source), progress=False)
        if held is not None:
            with suppress(OSError):  # another one removes them just now, or they cannot be locked
                held.enter_context(shared(shards / RECORD))
        if is_whole(shards):
            break
    else:
        raise UserError(
            f"{source.name}: the shards in '{shards}' are not whole after they were written {TRIES} times, or others "
            "lie among them; remove that folder"
        )
    os.utime(shards)  # in use now
    for other in cache.glob(f"shards-{place}-*"):
        if other != shards:
            _remove_unused(other)
    return replace(source, data=source.data.model_copy(update={"shards": str(shards)}))


def _remove_unused(shards: Path) -> None:
    """Remove shards that nobody used for long and nobody holds."""
    with suppress(OSError):  # an evaluation reads them still, or another one has removed them
        if (shards / RECORD).is_file() and time.time() - shards.stat().st_mtime > UNUSED_S:
            with exclusive(shards / RECORD, patience=0):
                shutil.rmtree(shards, ignore_errors=True)


def _names(source: DatasetSource) -> Path | None:
    return Path(source.data.classnames) if source.data.classnames else None


def _content(source: DatasetSource) -> str:
    """16 hex digits of every file's name, size, inode and times, and of the class names.

    An image that is moved to another class keeps its size, often its name and its time, but not all of these at its
    place.
    """
    digest = hashlib.sha256()
    try:
        for folder, below, files in os.walk(source.folder, followlinks=True):
            below.sort()
            for name in sorted(files):
                at = os.stat(path := os.path.join(folder, name))
                digest.update(
                    f"{path}\0{at.st_size}\0{at.st_ino}\0{at.st_mtime_ns}\0{at.st_ctime_ns}\n".encode(
                        "utf-8", "surrogateescape"
                    )
                )
        if names := _names(source):
            digest.update(names.read_bytes())
    except OSError as error:
        raise UserError(
            f"'{error.filename or source.folder}' cannot be read ({error.strerror}); mend or remove it"
        ) from None
    return digest.hexdigest()[:16]
