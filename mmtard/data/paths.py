"""Which shards a setting names, which of them are remote, and where their index belongs. No torch."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from itertools import islice
from pathlib import Path

from braceexpand import UnbalancedBracesError, braceexpand

from ..config import Data
from ..errors import UserError

MOST_SHARDS = 1_000_000  # that a pattern may name
RANGE = r"\{(-?\d+)\.\.(-?\d+)(?=[.}])"


def shards_of(settings: Data) -> list[str]:
    """Every shard that the section `data` names. Raises as `expand_shards` and `check_openers` do."""
    shards = expand_shards(settings.shards)
    check_openers(shards, settings.allow_pipe)
    return shards


def check_openers(shards: list[str], allow_pipe: bool) -> None:
    """Raises UserError for a `pipe:` shard, which runs a command on this machine, unless it is allowed."""
    for shard in shards:
        if shard.startswith("pipe:") and not allow_pipe:
            raise UserError(
                f"data.shards: '{shard}' runs a command on this machine; if you wrote it or trust it, allow it with "
                "data.allow_pipe=true (on the command line of index and evaluate: --allow-pipe)"
            )


def expand_shards(shards: str | list[str]) -> list[str]:
    """Every shard that a `data.shards` value names, sorted within each folder; nothing is opened.

    A folder means its `*.tar` files, else those of its `train/`; a pattern may have braces or `*`; `::` joins several.
    What is found by listing a folder is a file, whatever its name: only what the value itself says is an opener.
    Raises UserError naming a shard that is missing.
    """
    out = []
    for spec in _apart(shards):
        if not is_remote(spec) and Path(spec).is_dir():
            out += _folder(spec)
        else:
            out += [path for braced in _braces(spec) for path in _matches(braced)]
    for path in out:
        if not is_remote(path) and not Path(path).is_file():
            remedy = (
                "correct the pattern or restore the file" if Path(path).suffix else "no such folder: correct the path"
            )
            raise UserError(f"data.shards: missing shard '{path}'; {remedy}")
    if not out:
        raise UserError("data.shards: names no shard; give a folder, a pattern or a list")
    return out


def is_remote(shard: str) -> bool:
    """Whether a shard is read through an opener (`pipe:`, `file:`, `https://`, `s3://`) and staged first."""
    return shard.startswith(("pipe:", "file:")) or "://" in shard


def _apart(shards: str | list[str]) -> list[str]:
    """The values of a list, each cut at `::`, by which open_clip joins several. A command is never cut."""
    specs = [shards] if isinstance(shards, str) else shards
    return [part for spec in specs for part in ([spec] if spec.startswith("pipe:") else spec.split("::")) if part]


def _folder(spec: str) -> list[str]:
    folder = Path(spec)
    found = sorted(folder.glob("*.tar"), key=_natural) or sorted((folder / "train").glob("*.tar"), key=_natural)
    if not found:
        packed = next(
            (p.name for end in ("gz", "tgz", "zst", "bz2", "xz") for p in sorted(folder.glob(f"*.{end}"))), None
        )
        if packed:
            raise UserError(
                f"data.shards: no .tar in '{spec}' but '{packed}'; unpack it to plain .tar, which is read at any place"
            )
        raise UserError(f"data.shards: no .tar in '{spec}'; write shards with `mmtard shards IMAGES {spec}`")
    return _as_files(found)


def _matches(spec: str) -> list[str]:
    """The files that a pattern with `*`, `?` or `[...]` matches; the text itself where it is no such pattern."""
    if is_remote(spec) or not glob.has_magic(spec) or Path(spec).exists():
        return [spec]
    found = sorted((Path(path) for path in glob.glob(spec)), key=_natural)
    if not found:
        raise UserError(f"data.shards: no file matches '{spec}'; correct the pattern or restore the files")
    return _as_files(found)


def _as_files(found: list[Path]) -> list[str]:
    """Paths as text that no opener takes for its own: a file called `pipe:x.tar` in `.` is `./pipe:x.tar`."""
    return [f"./{path}" if is_remote(str(path)) else str(path) for path in found]


def default_index(shards: list[str], label_key: str | None = None, caption_key: str | None = None) -> Path:
    """Where the index of these shards belongs unless data.index says otherwise.

    Beside the shards where all lie in one folder, if it is there already or may be written there, else in the user's
    cache folder. Labels or captions from keys of .json members make another index.
    """
    cached = cached_index(shards, label_key, caption_key)
    folders = {Path(os.path.abspath(s)).parent for s in shards} if not any(map(is_remote, shards)) else set()
    if len(folders) == 1:
        folder = folders.pop()
        whole = {p.name for p in folder.glob("*.tar")} == {Path(s).name for s in shards}
        plain = whole and label_key is None and caption_key is None
        beside = folder / ("mmtard-index.npz" if plain else f"mmtard-{cached.name}")
        # Root passes every access check; a folder that nobody may write to was meant to stay as it is.
        if beside.is_file() or (os.access(folder, os.W_OK) and folder.stat().st_mode & 0o222):
            return beside
    return cached


def cached_index(shards: list[str], label_key: str | None = None, caption_key: str | None = None) -> Path:
    """The place of these shards' index in the user's cache folder."""
    words = [os.path.abspath(s) if not is_remote(s) else s for s in shards]
    words += [f"{name}:{key}" for name, key in (("label", label_key), ("caption", caption_key)) if key is not None]
    digest = hashlib.sha256("\n".join(words).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmtard" / f"index-{digest}.npz"


def _natural(path: Path) -> tuple[list, str]:
    """Sorts by name, numbers in it by their size: 2.tar before 10.tar."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)], path.name


def _braces(spec: str) -> list[str]:
    # The program lays out every range of numbers before the first name; a long one would fill the memory.
    try:
        longest = max((abs(int(last) - int(first)) for first, last in re.findall(RANGE, spec)), default=0)
        names = [] if longest > MOST_SHARDS else list(islice(braceexpand(spec), MOST_SHARDS + 1))
        if not 0 < len(names) <= MOST_SHARDS:
            raise UserError(f"data.shards: '{spec}' names more than {MOST_SHARDS:,} shards; correct its braces")
        return names
    except (UnbalancedBracesError, ValueError, RecursionError) as error:
        raise UserError(
            f"data.shards: '{spec}' is not a brace pattern ({error}); write it like train-{{0000..0099}}.tar"
        ) from None
