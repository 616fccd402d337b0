"""Building the index of shards, and checking shards against the index they have."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from ..errors import UserError
from .index import FROM_MEMBERS, PER_SAMPLE, PER_SHARD, Index, Keys, difference, refuse_other_file, write_index
from .shard_scan import scan_shard
from .worker_pool import map_in_processes


def build_index(
    shards: list[str], out: Path, jobs: int | None = None, progress: bool = True, keys: Keys = FROM_MEMBERS
) -> Index:
    """Read every shard once, local or through webdataset's opener, and publish the index at `out`.

    Raises UserError naming the shard that is empty, truncated, not a plain tar, unreadable, or holds a key twice, and
    where `out` is a file that is no index.
    """
    refuse_other_file(out)
    parts = map_in_processes(partial(scan_shard, keys=keys), list(shards), jobs, "index", progress)
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in (*PER_SHARD, *PER_SAMPLE)}
    index = Index(**arrays, json_keys=parts[0].json_keys)
    try:
        write_index(index, out)
    except OSError as error:
        raise UserError(
            f"cannot write the index '{out}': {error.strerror}; "
            "name another file (`mmtard index SHARDS --out FILE`, data.index)"
        ) from None
    return index


def check_shards(
    index: Index, shards: list[str], numbers: list[int], path: Path, images: bool, jobs: int | None = None
) -> None:
    """Walk the given shards anew and compare them with the index. Raises UserError naming the first that differs.

    Without `images` only headers, labels and captions are read: a changed image is found when it is read.
    """
    scan = partial(scan_shard, keys=index.read_by, images=images)
    found = map_in_processes(scan, [shards[n] for n in numbers], jobs, "check", progress=images)
    for number, now in zip(numbers, found):
        what = difference(index.shard(number), now, images)
        if what:
            raise UserError(
                f"shard '{shards[number]}' changed since it was indexed: {what} differ; "
                f"run `mmtard index SHARDS --out {path}` again, or restore the shard"
            )
