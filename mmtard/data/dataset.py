"""A data set as the settings name it: its shards, their index, its class names and prompts, and its samples' bytes."""

import errno
import os
from datetime import timedelta
from functools import cached_property
from pathlib import Path

import numpy as np

from ..config import Data
from ..errors import UserError
from ..files import exclusive
from .index import EXTENSIONS, LABEL_MISSING, LABEL_OK, Index, build_index, load_index, shard_name
from .paths import default_index, is_remote, shards_of

INDEXING = timedelta(days=1)  # at the most; a terabyte takes a core some two hours


class Dataset:
    """N samples in shards; a sample's id is its place in the index, 0..N-1.

    `paths` list of str [S], as given in the settings; `labels` int64 [N], -1 where there is none; `shard_counts` int64 [S].
    """

    def __init__(self, index: Index, paths: list[str]):
        self.index, self.paths = index, list(paths)
        self.labels, self.shard_counts, self.shard_sizes = index.labels, index.shard_counts, index.shard_sizes
        self._starts = np.concatenate([[0], np.cumsum(index.shard_counts)])

    def __len__(self) -> int:
        return len(self.index)

    @property
    def fingerprint(self) -> str:
        return self.index.fingerprint

    @property
    def remote(self) -> bool:
        """Whether any shard has to be staged before it is read."""
        return any(map(is_remote, self.paths))

    @cached_property
    def keys(self) -> list[str]:
        return [key.decode("utf-8", "replace") for key in self.index.keys.tolist()]

    def shard_of(self, sample: int) -> int:
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
        status = self.index.label_status[sample]
        return (
            None
            if status == LABEL_OK
            else "no .cls member"
            if status == LABEL_MISSING
            else ".cls is not a class number"
        )


def open_dataset(settings: Data) -> Dataset:
    """The data set of the settings; the index of local shards is built when there is none.

    Any number of processes may call this at once: one builds, the others of its node wait for it.
    Raises UserError for remote shards without an index, and when the shards are no longer those indexed.
    """
    shards = shards_of(settings)
    path = Path(settings.index) if settings.index else default_index(shards)
    if not path.is_file():
        if any(map(is_remote, shards)):
            raise UserError(
                f"data.index: remote shards have no index at '{path}'; run `mmtard index SHARDS --out FILE` once and set data.index to FILE"
            )
        _build_once(shards, path)
    index = load_index(path)
    _check_unchanged(index, shards, path)
    return Dataset(index, shards)


def open_dataset_on_all_ranks(settings: Data, ranks) -> Dataset:
    """The data set on every rank of a launch; the first one builds its index where there is none, while the others wait. Collective."""
    ranks.run_on_first(lambda: open_dataset(settings).fingerprint, patience=INDEXING)
    return open_dataset(settings)


def _build_once(shards: list[str], path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(path.with_name(f".{path.name}.lock")):
            if not path.is_file():
                build_index(shards, path)
    except OSError as error:
        if error.errno in (
            errno.ENOLCK,
            errno.ENOSYS,
            errno.ENOTSUP,
        ):  # no locks there: several may build, the last to finish stays
            build_index(shards, path)
            return
        raise UserError(
            f"cannot write the index '{path}': {error.strerror}; set data.index to a file on another file system"
        ) from None


def _check_unchanged(index: Index, shards: list[str], path: Path) -> None:
    remedy = f"the shards changed since they were indexed; run `mmtard index SHARDS --out {path}` again"
    names = [shard_name(s) for s in shards]
    indexed = [str(n) for n in index.shard_names]
    if names != indexed:
        at = next(
            (i for i, pair in enumerate(zip(names, indexed)) if pair[0] != pair[1]), min(len(names), len(indexed))
        )
        now, then = (f"'{some[at]}'" if at < len(some) else "none" for some in (names, indexed))
        raise UserError(
            f"index '{path}' is of {len(indexed)} shards, data.shards names {len(names)}; shard {at} is {now}, indexed was {then}: {remedy}"
        )
    for shard, size in zip(shards, index.shard_sizes):
        if not is_remote(shard) and os.path.getsize(shard) != size:
            raise UserError(f"shard '{shard}' has {os.path.getsize(shard)} bytes, indexed were {size}: {remedy}")
