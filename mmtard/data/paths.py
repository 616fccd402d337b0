"""Which shards a setting names, which of them are remote, and where their index belongs. No torch."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from braceexpand import UnbalancedBracesError, braceexpand

from ..config import Data
from ..errors import UserError
from ..files import user_cache

MOST_SHARDS = 1_000_000  # that a pattern may name
MOST_TEXT = 2**30  # bytes of all their names
FEW = 8  # shards of a folder that are asked for one by one


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
        if not is_remote(spec) and os.path.isdir(spec):
            out += _folder(spec)
        else:
            out += [path for braced in _braces(spec) for path in _matches(braced)]
        if len(out) > MOST_SHARDS:
            raise UserError(f"data.shards: names more than {MOST_SHARDS:,} shards up to '{spec}'; correct its patterns")
    missing = _first_missing([path for path in out if not is_remote(path)])
    if missing is not None:
        remedy = (
            "correct the pattern or restore the file"
            if Path(missing).suffix
            else "no such folder: correct the path, or write it with `mmtard shards`"
        )
        raise UserError(f"data.shards: missing shard '{_short(missing)}'; {remedy}")
    if not out:
        raise UserError("data.shards: names no shard; give a folder, a pattern or a list")
    return out


def _first_missing(paths: list[str]) -> str | None:
    """The first path that is no file; None where all are. A folder of many is listed once, and its files not asked."""
    files: set[str] = set()
    for folder, count in Counter(map(os.path.dirname, paths)).items():
        if count > FEW:
            with suppress(OSError, ValueError), os.scandir(folder or ".") as entries:
                files |= {os.path.join(folder, entry.name) for entry in entries if entry.is_file()}
    return next((path for path in paths if path not in files and not os.path.isfile(path)), None)


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
    if is_remote(spec) or not glob.has_magic(spec) or os.path.exists(spec):
        return [spec]
    found = sorted((Path(path) for path in glob.glob(spec)), key=_natural)
    if not found:
        raise UserError(f"data.shards: no file matches '{spec}'; correct the pattern or restore the files")
    return _as_files(found)


def _as_files(found: list[Path]) -> list[str]:
    """Paths as text that no opener takes for its own: a file called `pipe:x.tar` in `.` is `./pipe:x.tar`."""
    return [f"./{path}" if is_remote(str(path)) else str(path) for path in found]


def index_file(settings: Data, shards: list[str]) -> Path:
    """Where the index of the shards that the section `data` names is, or will be once it is made."""
    return Path(settings.index or default_index(shards, settings.label_key, settings.caption_key))


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
    return user_cache() / f"index-{digest}.npz"


def _natural(path: Path) -> tuple[list, str]:
    """Sorts by name, numbers in it by their size: 2.tar before 10.tar."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)], path.name


def _braces(spec: str) -> list[str]:
    # braceexpand lays out every group before the first name, so they are counted first.
    try:
        number = _count(spec)
        if number > MOST_SHARDS or number * len(spec) > MOST_TEXT:
            raise UserError(f"data.shards: '{_short(spec)}' names more than {MOST_SHARDS:,} shards; correct its braces")
        return list(braceexpand(spec))
    except (UnbalancedBracesError, ValueError, RecursionError) as error:
        raise UserError(
            f"data.shards: '{_short(spec)}' is not a brace pattern ({_short(str(error))}); "
            "write it like train-{0000..0099}.tar"
        ) from None


def _count(pattern: str) -> int:
    """How many names a brace pattern has: the product over its groups. Makes none of them."""
    total = 1
    for group in _groups(pattern):
        parts = _parts(group)
        if range_ := re.fullmatch(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?", group):
            first, last, step = (int(number or 1) for number in range_.groups())
            total *= abs(last - first) // (step or 1) + 1
        elif re.fullmatch(r"[A-Za-z]\.\.[A-Za-z](\.\.-?\d+)?", group):
            total *= 52  # at the most
        else:
            total *= sum(map(_count, parts))
    return total


def _groups(pattern: str) -> list[str]:
    """What stands between the outermost braces of a pattern; a backslash takes a brace's meaning away."""
    groups, depth, begin = [], 0, 0
    for place, character in _meaningful(pattern, "{}"):
        if character == "{":
            begin = place + 1 if depth == 0 else begin
            depth += 1
        else:
            depth -= 1
            if depth == 0:
                groups.append(pattern[begin:place])
    return groups


def _parts(group: str) -> list[str]:
    """A group cut at the commas that are in no inner braces."""
    parts, depth, begin = [], 0, 0
    for place, character in _meaningful(group, "{},"):
        if character == "," and depth == 0:
            parts.append(group[begin:place])
            begin = place + 1
        depth += {"{": 1, "}": -1, ",": 0}[character]
    return [*parts, group[begin:]]


def _meaningful(text: str, characters: str) -> Iterator[tuple[int, str]]:
    """(place, character) of those of the characters that no backslash precedes."""
    skip = False
    for place, character in enumerate(text):
        if skip or character == "\\":
            skip = not skip
        elif character in characters:
            yield place, character


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:197]}..."
