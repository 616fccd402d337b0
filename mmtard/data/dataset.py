"""A data set as the settings name it: its shards, and their index, which is built or checked as it is opened."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path

import numpy as np

from ..config import Data
from ..distributed.ranks import Ranks
from ..errors import UserError
from ..files import exclusive
from .index import (
    EXTENSIONS,
    LABEL_BAD,
    LABEL_MISSING,
    LABEL_OK,
    Index,
    Keys,
    OldIndexError,
    load_index,
    write_index,
)
from .indexing import build_index, check_shards
from .paths import cached_index, index_file, is_remote, shards_of
from .shard_scan import shard_name

NO_LABEL = "no .cls member"
INDEXING = timedelta(days=1)  # at the most; a terabyte takes a core some two hours


class Dataset:
    """N samples in shards; a sample's id is its place in the index, 0..N-1.

    `paths` list of str [S], as given in the settings; `labels` int64 [N], -1 where there is none; `shard_counts` int64
    [S].
    """

    def __init__(self, index: Index, paths: list[str]):
        self.index, self.paths = index, list(paths)
        self.labels, self.shard_counts, self.shard_sizes = index.labels, index.shard_counts, index.shard_sizes
        self._starts = np.concatenate([[0], np.cumsum(index.shard_counts)])

    def __len__(self) -> int:
        return len(self.index)

    @property
    def fingerprint(self) -> str:
        """A digest of the index: which samples lie where, and their bytes' checksums."""
        return self.index.fingerprint

    @property
    def remote(self) -> bool:
        """Whether any shard has to be staged before it is read."""
        return any(map(is_remote, self.paths))

    @cached_property
    def keys(self) -> list[str]:
        """Every sample's key, in the order of the ids; bytes that are no UTF-8 are shown as marks."""
        return [key.decode("utf-8", "replace") for key in self.index.keys.tolist()]

    def shard_of(self, sample: int) -> int:
        """The place in `paths` of the shard that holds a sample."""
        return int(np.searchsorted(self._starts, sample, side="right")) - 1

    def shard_range(self, shard: int) -> range:
        """The ids of a shard's samples."""
        return range(int(self._starts[shard]), int(self._starts[shard + 1]))

    def name(self, sample: int) -> str:
        """`0001.tar/key`, as logs and errors name a sample."""
        return f"{self.index.shard_names[self.shard_of(sample)]}/{self.index.keys[sample].decode('utf-8', 'replace')}"

    def file_name(self, sample: int) -> str:
        """The image member's name inside its shard."""
        return f"{self.index.keys[sample].decode('utf-8', 'replace')}.{EXTENSIONS[self.index.extension[sample]]}"

    def label_problem(self, sample: int) -> str | None:
        """Why a sample has no label; None when it has one."""
        key = self.index.read_by.label
        problems = {
            LABEL_OK: None,
            LABEL_MISSING: NO_LABEL if key is None else f"no '{key}' in a .json member",
            LABEL_BAD: ".cls is not a class number" if key is None else f"'{key}' is not a class number",
        }
        return problems[int(self.index.label_status[sample])]


def open_dataset(settings: Data, look_again: bool = True) -> Dataset:
    """The data set of the settings; the index of local shards is built when there is none.

    Any number of processes may call this at once: one builds, the others of its node wait for it. A local shard that
    was written since it was indexed is walked anew (headers, labels, captions), unless `look_again` is False. Raises
    UserError for remote shards without an index, and when the shards are no longer those indexed.
    """
    return _open(settings, look_again)[0]


def open_dataset_on_all_ranks(settings: Data, ranks: Ranks) -> Dataset:
    """The data set on every rank of a launch. Collective.

    The first rank alone looks at the shards: it builds the index where there is none, and walks shards that were
    written since. The others wait, then read the index that it names, and meet a shard that their node lacks when they
    read it.
    """
    opened: list[Dataset] = []

    def of_first() -> tuple[list[str], Path, str]:
        dataset, path = _open(settings, look_again=True)
        opened.append(dataset)
        return dataset.paths, path, dataset.fingerprint

    shards, path, fingerprint = ranks.run_on_first(of_first, patience=INDEXING)
    if opened:
        return opened[0]
    index = _fitting(path, Keys(settings.label_key, settings.caption_key))
    if index is not None and index.fingerprint == fingerprint:
        return Dataset(index, shards)
    return open_dataset(settings, look_again=False)  # its node has an index of its own, in a cache folder


def _open(settings: Data, look_again: bool) -> tuple[Dataset, Path]:
    """(the data set, the file of its index)."""
    shards = shards_of(settings)
    keys = Keys(settings.label_key, settings.caption_key)
    path = index_file(settings, shards)
    index = _fitting(path, keys)
    if index is None and any(map(is_remote, shards)):
        _refuse_remote(path, keys)
    if index is None:
        if path.is_file() and not os.access(path.parent, os.W_OK) and not settings.index:
            path = cached_index(shards, keys.label, keys.caption)
        index = _build_once(shards, path, keys)
    return Dataset(_unchanged(index, shards, path, look_again), shards), path


def _fitting(path: Path, keys: Keys) -> Index | None:
    """The index at `path`; None where there is none, or one of an older format or made with other keys."""
    try:
        index = load_index(path)
    except (FileNotFoundError, OldIndexError):
        return None
    return index if index.read_by == keys else None


def _refuse_remote(path: Path, keys: Keys) -> None:
    how = "".join(
        f" --{name}-key {key}" for name, key in (("label", keys.label), ("caption", keys.caption)) if key is not None
    )
    reason = f"remote shards have no index at '{path}'"
    if path.is_file():
        reason = f"the index at '{path}' of the remote shards is of an older format or was made with other keys"
    raise UserError(f"data.index: {reason}; run `mmtard index SHARDS --out FILE{how}` once and set data.index to FILE")


def _build_once(shards: list[str], path: Path, keys: Keys) -> Index:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(path.with_name(f".{path.name}.lock")):
            if (index := _fitting(path, keys)) is None:
                index = build_index(shards, path, keys=keys)
            return index
    except OSError as error:
        # Without locks several may build; the last to finish stays.
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            return build_index(shards, path, keys=keys)
        raise UserError(
            f"cannot write the index '{path}': {error.strerror}; set data.index to a file on another file system"
        ) from None


def _unchanged(index: Index, shards: list[str], path: Path, look_again: bool) -> Index:
    """The index, with new modification times where shards were written anew with the same content.

    Raises UserError for shards of other names or sizes, and for those whose samples, labels or captions differ.
    """
    remedy = f"the shards changed since they were indexed; run `mmtard index SHARDS --out {path}` again"
    names = [shard_name(s).encode("utf-8", "replace").decode() for s in shards]
    indexed = [str(n) for n in index.shard_names]
    if names != indexed:
        differ = (i for i, pair in enumerate(zip(names, indexed)) if pair[0] != pair[1])
        at = next(differ, min(len(names), len(indexed)))
        now, then = (f"'{some[at]}'" if at < len(some) else "none" for some in (names, indexed))
        raise UserError(
            f"index '{path}' is of {len(indexed)} shards, data.shards names {len(names)}; "
            f"shard {at} is {now}, indexed was {then}: {remedy}"
        )
    times = index.shard_mtimes.copy()
    for number, (shard, size) in enumerate(zip(shards, index.shard_sizes)):
        if not is_remote(shard):
            status = os.stat(shard)
            times[number] = status.st_mtime_ns
            if status.st_size != size:
                raise UserError(f"shard '{shard}' has {status.st_size} bytes, indexed were {size}: {remedy}")
    written = np.flatnonzero(times != index.shard_mtimes).tolist()
    if not written or not look_again:
        return index
    check_shards(index, shards, written, path, images=False)
    index = replace(index, shard_mtimes=times)
    try:
        write_index(index, path)
    except OSError:
        pass  # in a folder of others: the next start looks again
    return index
