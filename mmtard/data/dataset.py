"""A data set as the settings name it: its shards, their index, its class names and prompts, and its samples' bytes."""

import errno
import os
import zlib
from collections import OrderedDict
from datetime import timedelta
from functools import cached_property
from pathlib import Path

import numpy as np

from ..config import Data, default_index, expand_shards, is_remote
from ..errors import UserError
from .files import exclusive
from .index import EXTENSIONS, LABEL_MISSING, LABEL_OK, Index, build_index, load_index, shard_name

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
        return None if status == LABEL_OK else "no .cls member" if status == LABEL_MISSING else ".cls is not a class number"


def open_dataset(settings: Data) -> Dataset:
    """The data set of the settings; the index of local shards is built when there is none.

    Any number of processes may call this at once: one builds, the others of its node wait for it.
    Raises UserError for remote shards without an index, and when the shards are no longer those indexed.
    """
    shards = expand_shards(settings.shards)
    path = Path(settings.index) if settings.index else default_index(shards)
    if not path.is_file():
        if any(map(is_remote, shards)):
            raise UserError(f"data.index: remote shards have no index at '{path}'; run `mmtard index SHARDS --out FILE` once and set data.index to FILE")
        _build_once(shards, path)
    index = load_index(path)
    _check_unchanged(index, shards, path)
    return Dataset(index, shards)


def open_on_all(settings: Data, ranks) -> Dataset:
    """The data set on every rank of a launch; the first one builds its index where there is none, while the others wait. Collective."""
    ranks.from_first(lambda: open_dataset(settings).fingerprint, patience=INDEXING)
    return open_dataset(settings)


def _build_once(shards: list[str], path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(path.with_name(f".{path.name}.lock")):
            if not path.is_file():
                build_index(shards, path)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):  # no locks there: several may build, the last to finish stays
            build_index(shards, path)
            return
        raise UserError(f"cannot write the index '{path}': {error.strerror}; set data.index to a file on another file system") from None


def _check_unchanged(index: Index, shards: list[str], path: Path) -> None:
    remedy = f"the shards changed since they were indexed; run `mmtard index SHARDS --out {path}` again"
    names = [shard_name(s) for s in shards]
    indexed = [str(n) for n in index.shard_names]
    if names != indexed:
        at = next((i for i, pair in enumerate(zip(names, indexed)) if pair[0] != pair[1]), min(len(names), len(indexed)))
        now, then = (f"'{some[at]}'" if at < len(some) else "none" for some in (names, indexed))
        raise UserError(f"index '{path}' is of {len(indexed)} shards, data.shards names {len(names)}; shard {at} is {now}, indexed was {then}: {remedy}")
    for shard, size in zip(shards, index.shard_sizes):
        if not is_remote(shard) and os.path.getsize(shard) != size:
            raise UserError(f"shard '{shard}' has {os.path.getsize(shard)} bytes, indexed were {size}: {remedy}")


def classnames(settings: Data, dataset: Dataset) -> list[str]:
    """The class names, in the order of the labels: `settings.classnames`, else classnames.txt beside the shards or one folder up.

    Raises UserError when there is no such file, or a label of the data has no name in it.
    """
    path = _classnames_file(settings)
    names = _lines(path, "data.classnames")
    highest = int(dataset.labels.max(initial=-1))
    if highest >= len(names):
        raise UserError(f"data.classnames: '{path}' has {len(names)} names, and the shards have a sample of label {highest}; give the file of their classes")
    return names


def _classnames_file(settings: Data) -> Path:
    if settings.classnames:
        return Path(settings.classnames)
    first = expand_shards(settings.shards)[0]
    if not is_remote(first):
        folder = Path(os.path.abspath(first)).parent
        for path in (folder / "classnames.txt", folder.parent / "classnames.txt"):
            if path.is_file():
                return path
    raise UserError(f"data.classnames: no classnames.txt beside '{first}'; set data.classnames to a file of one name a line, in the order of the labels, or data.targets=none where the method reads embeddings alone")


def templates(settings: Data) -> list[str]:
    """The prompts, each with `{}` where the class name goes. Raises UserError for one without a place, or with other braces."""
    given = settings.templates
    if isinstance(given, str):
        given = [given] if "{" in given and not Path(given).is_file() else _lines(Path(given), "data.templates")
    prompts = [t.replace("{c}", "{}") for t in given]
    for prompt in prompts:
        rest = prompt.replace("{}", "")
        if rest == prompt or "{" in rest or "}" in rest:
            raise UserError(f"data.templates: '{prompt}' has no single kind of place for the class name; write it like 'a photo of a {{}}'")
    if not prompts:
        raise UserError("data.templates: no prompt given; write at least one, like 'a photo of a {}'")
    return prompts


def _lines(path: Path, key: str) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: cannot read '{path}' ({getattr(error, 'strerror', None) or error}); give a text file, one entry a line") from None
    return [line for line in lines if line]


class Reader:
    """The bytes of any sample. Holds the most recently used shards open; each process needs a reader of its own.

    `staging` brings remote shards to this node; without it every shard has to be a local file.
    """

    MAX_OPEN = 128  # a rank reads from as many shards at a time as it has lanes

    def __init__(self, dataset: Dataset, staging=None):
        self._open: OrderedDict[int, int] = OrderedDict()
        if dataset.remote and staging is None:
            raise ValueError("remote shards need a Staging")
        self.dataset, self.staging = dataset, staging

    def image(self, sample: int) -> bytes:
        """The encoded image. Raises UserError naming the shard when its bytes are not those that were indexed."""
        index, shard = self.dataset.index, self.dataset.shard_of(sample)
        data = self._read(shard, int(index.image_offset[sample]), int(index.image_size[sample]))
        if zlib.crc32(data) != index.image_crc[sample]:
            where = f"shard '{self.dataset.paths[shard]}'"
            raise UserError(f"{where} changed since it was indexed ('{self.dataset.name(sample)}' differs); run `mmtard index` again")
        return data

    def caption(self, sample: int) -> str:
        """The .txt member; an empty string where there is none."""
        index, size = self.dataset.index, int(self.dataset.index.text_size[sample])
        if size < 0:
            return ""
        return self._read(self.dataset.shard_of(sample), int(index.text_offset[sample]), size).decode("utf-8", "replace").strip()

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        try:
            fd = self._file(shard)
            if self.staging is not None and is_remote(self.dataset.paths[shard]):
                os.utime(fd)  # keeps a shard in use from being the one evicted
            return os.pread(fd, size, offset)
        except OSError as error:
            raise UserError(f"shard '{self.dataset.paths[shard]}' cannot be read: {error.strerror or error}; restore the file") from None

    def _file(self, shard: int) -> int:
        fd = self._open.pop(shard, None)
        if fd is None:
            self._drop_evicted()
            if len(self._open) >= self.MAX_OPEN:
                os.close(self._open.popitem(last=False)[1])
            path = self.dataset.paths[shard]
            fd = self.staging.open(shard) if self.staging is not None else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._open[shard] = fd
        return fd

    def _drop_evicted(self) -> None:
        """Close what was evicted from the staging meanwhile: its bytes are on the disk for as long as it is open."""
        for shard, fd in list(self._open.items()):
            if self.staging is not None and os.fstat(fd).st_nlink == 0:
                os.close(self._open.pop(shard))

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self):
        self.close()
