"""The bytes of any sample of a data set."""

import os
import zlib
from collections import OrderedDict

from ..errors import UserError
from .dataset import Dataset
from .paths import is_remote


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
            raise UserError(
                f"{where} changed since it was indexed ('{self.dataset.name(sample)}' differs); run `mmtard index` again"
            )
        return data

    def caption(self, sample: int) -> str:
        """The .txt member; an empty string where there is none."""
        index, size = self.dataset.index, int(self.dataset.index.text_size[sample])
        if size < 0:
            return ""
        return (
            self._read(self.dataset.shard_of(sample), int(index.text_offset[sample]), size)
            .decode("utf-8", "replace")
            .strip()
        )

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        try:
            fd = self._file(shard)
            if self.staging is not None and is_remote(self.dataset.paths[shard]):
                os.utime(fd)  # keeps a shard in use from being the one evicted
            return os.pread(fd, size, offset)
        except OSError as error:
            raise UserError(
                f"shard '{self.dataset.paths[shard]}' cannot be read: {error.strerror or error}; restore the file"
            ) from None

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
