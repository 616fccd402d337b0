"""Remote shards on the node's own disk: fetched once for all its ranks and workers, the least recently used evicted.

A reader fetches what it needs itself; the stager (`data/stager.py`) only makes that rare. So nothing depends on the
stager being on time.
"""

import hashlib
import os
import re
import shutil
import stat
import tempfile
import time
from pathlib import Path

from ..config import Cache, expand_path
from ..errors import UserError
from ..files import exclusive, held
from .dataset import Dataset
from .index import difference
from .openers import open_shard
from .paths import is_remote
from .shard_scan import scan_shard


class _WriteError(Exception):
    """The disk that a shard is staged on refused a write; the cause says why."""


class Staging:
    """The node's folder of fetched shards; never holds more than `cache.max_gb` (10^9 bytes).

    Raises UserError when the folder cannot be made, or a shard is larger than the folder may grow.
    """

    ATTEMPTS, PAUSE_S = 3, 2.0

    def __init__(self, dataset: Dataset, cache: Cache):
        self.dataset, self.cache = dataset, cache
        self.folder = _folder(cache)
        self.limit = int(cache.max_gb * 1e9)
        for path, size in zip(dataset.paths, dataset.shard_sizes):
            if is_remote(path) and size > self.limit:
                raise UserError(
                    f"data.cache.max_gb: shard '{path}' of {size / 1e9:.3g} GB does not fit in {cache.max_gb} GB; "
                    "raise it"
                )
        try:
            self.folder.mkdir(parents=True, exist_ok=True, **({} if cache.dir else {"mode": 0o700}))
        except OSError as error:
            raise UserError(
                f"data.cache.dir: cannot make '{self.folder}' ({error.strerror}); name a folder on this node's disk"
            ) from None
        if not cache.dir:
            _check_own(self.folder)

    def ensure(self, shard: int) -> Path:
        """The local file of shard number `shard`, fetched now if need be.

        Raises UserError naming the shard when its opener fails or gives another size than was indexed.
        """
        path, size = self.dataset.paths[shard], int(self.dataset.shard_sizes[shard])
        if not is_remote(path):
            return Path(path)
        # Two data sets may name their shards alike, and a shard written anew may keep its size: its content counts.
        content = self.dataset.index.shard(shard).fingerprint
        tag = hashlib.sha256(f"{path}\n{size}\n{content}".encode("utf-8", "surrogateescape")).hexdigest()[:16]
        name = re.sub(r"[^\w.-]", "_", str(self.dataset.index.shard_names[shard])).removesuffix(".tar")
        file = self.folder / f"staged-{tag}-{name}.tar"
        try:
            if self._use(file):
                return file
            with exclusive(file.with_suffix(".lock")):
                if not self._use(file):
                    self._fetch(shard, file)
        except OSError as error:
            why = error.strerror or error
            raise UserError(
                f"data.cache.dir: cannot stage shard '{path}' in '{self.folder}' ({why}); "
                "free space or name another folder"
            ) from None
        return file

    def open(self, shard: int) -> int:
        """A file descriptor of the shard's local file; it stays readable when the file is evicted."""
        while True:
            try:
                return os.open(self.ensure(shard), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                if not is_remote(self.dataset.paths[shard]):
                    raise

    def _use(self, file: Path) -> bool:
        try:
            os.utime(file)
        except FileNotFoundError:
            return False
        return True

    def _fetch(self, shard: int, file: Path) -> None:
        path, size = self.dataset.paths[shard], int(self.dataset.shard_sizes[shard])
        part = file.with_suffix(".part")
        self._make_room(part, size)
        try:
            self._copy(path, part, size)
            self._check_content(shard, part)
            with self._room():  # a listing made meanwhile could miss both names
                os.replace(part, file)
        finally:
            part.unlink(missing_ok=True)

    def _copy(self, path: str, part: Path, size: int) -> None:
        """Fill `part` with what the opener of `path` gives. Raises UserError for another size, or a full disk."""
        for attempt in range(1, self.ATTEMPTS + 1):
            try:
                got = _copy(path, part, size)
                break
            except _WriteError as error:
                raise self._cannot_write(path, size, error.__cause__) from None
            except OSError as error:
                if attempt == self.ATTEMPTS:
                    raise UserError(
                        f"shard '{path}' cannot be fetched ({error}); check that its opener works on this node"
                    ) from None
                time.sleep(self.PAUSE_S * attempt)
        if got != size:
            raise _other_size(path, f"{got}", size)

    def _cannot_write(self, path: str, size: int, error: OSError) -> UserError:
        left = shutil.disk_usage(self.folder).free / 1e9
        return UserError(
            f"data.cache.dir: cannot write shard '{path}' of {size / 1e9:.3g} GB to '{self.folder}' "
            f"({error.strerror}); its disk has {left:.3g} GB left: free space, lower data.cache.max_gb "
            "or name another folder"
        )

    def _check_content(self, shard: int, part: Path) -> None:
        """Raises UserError where the fetched shard has other samples, labels or captions than were indexed."""
        index = self.dataset.index.shard(shard)
        try:
            what = difference(index, scan_shard(str(part), index.read_by, images=False), images=False)
        except UserError:
            what = "its samples"
        if what:
            raise UserError(
                f"shard '{self.dataset.paths[shard]}' changed since it was indexed: {what} differ; "
                "run `mmtard index` again, or restore the shard"
            )

    def _room(self):
        return exclusive(self.folder / "room.lock")

    def _make_room(self, part: Path, size: int) -> None:
        """Evict until `size` more bytes fit, and take them by a file of that size."""
        while True:
            with self._room():
                part.unlink(missing_ok=True)  # left by a fetch that was killed: we hold the shard's lock
                shards, used = [], 0
                for entry in os.scandir(self.folder):
                    try:
                        info = entry.stat()
                    except FileNotFoundError:
                        continue
                    if not re.fullmatch(r"staged-[0-9a-f]{16}-.*\.(tar|part)", entry.name):
                        continue  # not ours to remove
                    used += info.st_size
                    if entry.name.endswith(".tar") or not held(Path(entry.path).with_suffix(".lock")):
                        shards.append((info.st_mtime_ns, entry.path, info.st_size))
                for _, old, freed in sorted(shards):
                    if used + size <= self.limit:
                        break
                    Path(old).unlink(missing_ok=True)
                    used -= freed
                if used + size <= self.limit:
                    with open(part, "wb") as file:
                        file.truncate(size)
                    return
            time.sleep(0.05)  # others are fetching; what they fetch can be evicted once it is whole


def _check_own(folder: Path) -> None:
    """Raises UserError unless the folder, whose name anyone can guess, is this user's own and closed to others.

    What lies in it is trusted as the shards that were indexed.
    """
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        owner = "a link" if stat.S_ISLNK(status.st_mode) else f"of user {status.st_uid}"
        raise UserError(
            f"data.cache.dir: '{folder}' is {owner}, not a folder of yours; set data.cache.dir to a folder of your own"
        )
    if status.st_mode & 0o022:
        folder.chmod(0o700)


def staging_for(dataset: Dataset, cache: Cache) -> Staging | None:
    """The staging that reading a data set needs: None where every shard is a local file. Raises as Staging does."""
    return Staging(dataset, cache) if dataset.remote else None


def _copy(path: str, part: Path, size: int) -> int:
    """How many bytes the opener of `path` gave, written to `part`; UserError when more than `size`.

    Raises OSError when the opener fails, _WriteError when the disk of `part` does.
    """
    got = 0
    with open_shard(path) as source, open(part, "r+b") as target:
        while data := source.read(1 << 20):
            got += len(data)
            if got > size:
                raise _other_size(path, f"more than {size}", size)
            try:
                target.write(data)
                target.flush()
            except OSError as error:
                raise _WriteError from error
    return got


def _other_size(path: str, got: str, size: int) -> UserError:
    return UserError(
        f"shard '{path}' gave {got} bytes, indexed were {size}: mend its opener, "
        "or run `mmtard index` again if the shard changed"
    )


def _folder(cache: Cache) -> Path:
    """Where the shards are staged; `~` and variables of data.cache.dir are those of this node."""
    if not cache.dir:
        return Path(tempfile.gettempdir()) / f"mmtard-shards-{os.getuid()}"
    try:
        return Path(expand_path(cache.dir))
    except ValueError as error:
        raise UserError(f"data.cache.dir: {error}") from None
