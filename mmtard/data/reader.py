"""The bytes of any sample of a data set."""

import json
import os
import zlib
from collections import OrderedDict

from ..errors import UserError
from .dataset import Dataset
from .limits import raise_file_limit
from .paths import is_remote
from .shard_scan import json_value


class Reader:
    """The bytes of any sample. Holds the most recently used shards open; each process needs a reader of its own.

    `staging` brings remote shards to this node; without it every shard has to be a local file.
    """

    MAX_OPEN = 128  # a rank reads from as many shards at a time as it has lanes
    SHARE_OF_FILES = 4  # at most this part of the files that the process may open

    def __init__(self, dataset: Dataset, staging=None):
        self._open: OrderedDict[int, int] = OrderedDict()
        if dataset.remote and staging is None:
            raise ValueError("remote shards need a Staging")
        self.dataset, self.staging = dataset, staging
        self.max_open = max(1, min(self.MAX_OPEN, raise_file_limit() // self.SHARE_OF_FILES))

    def image(self, sample: int) -> bytes:
        """The encoded image. Raises UserError naming the shard when its bytes are not those that were indexed."""
        index, shard = self.dataset.index, self.dataset.shard_of(sample)
        data = self._read(shard, int(index.image_offset[sample]), int(index.image_size[sample]))
        self._check(data, int(index.image_crc[sample]), sample, shard)
        return data

    def caption(self, sample: int) -> str:
        """The .txt member as it stands, without white space around it; an empty string where there is none.

        Where captions come from a key of the .json member: its text, or several texts, one a line.
        Raises UserError naming the shard when its bytes are not those that were indexed.
        """
        index, shard = self.dataset.index, self.dataset.shard_of(sample)
        if index.text_size[sample] < 0:
            return ""
        data = self._read(shard, int(index.text_offset[sample]), int(index.text_size[sample]))
        self._check(data, int(index.text_crc[sample]), sample, shard)
        if (key := index.read_by.caption) is not None:
            value = json_value(data, key)
            texts = value if isinstance(value, list) else [value]
            return "\n".join(" ".join(text.split()) for text in texts if isinstance(text, str)).strip()
        return data.decode("utf-8-sig", "replace").strip()

    def captions(self, sample: int) -> list[str]:
        """Every caption of a sample: a line of its text each, or the texts of a JSON list; [] where there is none."""
        text = self.caption(sample)
        if text.startswith("["):
            try:
                listed = json.loads(text)
            except (ValueError, RecursionError):
                listed = None
            if isinstance(listed, list) and listed and all(isinstance(one, str) for one in listed):
                return [" ".join(one.split()) for one in listed if one.strip()]
        return [line.strip() for line in text.split("\n") if line.strip()]

    def _check(self, data: bytes, crc: int, sample: int, shard: int) -> None:
        if zlib.crc32(data) != crc:
            where = f"shard '{self.dataset.paths[shard]}'"
            raise UserError(
                f"{where} changed since it was indexed ('{self.dataset.name(sample)}' differs); "
                "run `mmtard index` again"
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
            if len(self._open) >= self.max_open:
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
        """Close every shard's file; a later read opens it again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self):
        self.close()
