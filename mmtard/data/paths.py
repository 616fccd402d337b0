"""Which shards a setting names, which of them are remote, and where their index belongs. No torch."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from braceexpand import UnbalancedBracesError, braceexpand

from ..errors import UserError


def expand_shards(shards: str | list[str]) -> list[str]:
    """Every shard that a `data.shards` value names, sorted within each folder.

    A folder means its `*.tar` files, else those of its `train/`. Raises UserError naming a shard that is missing.
    """
    out = []
    for spec in [shards] if isinstance(shards, str) else shards:
        if is_remote(spec) or not Path(spec).is_dir():
            out += _braces(spec)
        else:
            folder = Path(spec)
            found = sorted(folder.glob("*.tar"), key=_natural) or sorted((folder / "train").glob("*.tar"), key=_natural)
            if not found:
                raise UserError(f"data.shards: no .tar in '{spec}'; write shards with `mmtard shards IMAGES {spec}`")
            out += [str(p) for p in found]
    for path in out:
        if not is_remote(path) and not Path(path).is_file():
            raise UserError(f"data.shards: missing shard '{path}'; correct the pattern or restore the file")
    if not out:
        raise UserError("data.shards: names no shard; give a folder, a pattern or a list")
    return out


def is_remote(shard: str) -> bool:
    """Whether a shard is read through an opener (`pipe:`, `file:`, `https://`, `s3://`) and staged first."""
    return shard.startswith(("pipe:", "file:")) or "://" in shard


def default_index(shards: list[str]) -> Path:
    """Where the index of these shards belongs unless data.index says otherwise.

    Beside the shards where all lie in one folder, if it is there already or may be written there, else in the user's cache folder.
    """
    digest = hashlib.sha256(
        "\n".join(os.path.abspath(s) if not is_remote(s) else s for s in shards).encode()
    ).hexdigest()[:16]
    folders = {Path(os.path.abspath(s)).parent for s in shards} if not any(map(is_remote, shards)) else set()
    if len(folders) == 1:
        folder = folders.pop()
        whole = {p.name for p in folder.glob("*.tar")} == {Path(s).name for s in shards}
        beside = folder / ("mmtard-index.npz" if whole else f"mmtard-index-{digest}.npz")
        # Root passes every access check; a folder that nobody may write to was meant to stay as it is.
        if beside.is_file() or (os.access(folder, os.W_OK) and folder.stat().st_mode & 0o222):
            return beside
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmtard" / f"index-{digest}.npz"


def _natural(path: Path) -> tuple[list, str]:
    """Sorts by name, numbers in it by their size: 2.tar before 10.tar."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)], path.name


def _braces(spec: str) -> list[str]:
    try:
        return list(braceexpand(spec))
    except (UnbalancedBracesError, ValueError) as error:
        raise UserError(
            f"data.shards: '{spec}' is not a brace pattern ({error}); write it like train-{{0000..0099}}.tar"
        ) from None
