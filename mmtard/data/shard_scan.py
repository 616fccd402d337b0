"""One shard, walked from its first member to its last: what its samples are, and what in it cannot be used."""

from __future__ import annotations

import json
import os
import re
import shlex
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import UserError
from ..files import size_in_words
from .index import EXAMPLES, EXTENSIONS, FROM_MEMBERS, LABEL_BAD, LABEL_MISSING, LABEL_OK, Index, Keys
from .openers import open_shard
from .paths import is_remote

OTHER_IMAGES = ("gif", "bmp", "tif", "tiff", "jp2", "avif", "heic", "heif", "jfif", "jpe", "ppm", "pgm", "svg", "npy")

# What a member may take: it is read as a whole.
MOST_BYTES = {"image": 2**30, "txt": 2**20, "json": 2**24, "cls": 2**10}


def shard_name(shard: str) -> str:
    """The file name of a shard: `0001.tar` of `/data/0001.tar` and of `pipe:aws s3 cp s3://bucket/0001.tar -`."""
    names = re.findall(r"[^/\s:=?&'\"]+\.tar(?![\w.])", shard) if is_remote(shard) else []
    return names[-1] if names else Path(shard).name


class _Counted:
    """A stream that knows how many bytes it has given.

    It ends the walk over a tar whose header speaks of more: tarfile would go on asking for ever.
    """

    MOST_AT_END = 100  # how often it may be asked when it has no more

    def __init__(self, stream: BinaryIO):
        self.stream, self.given, self.asked_at_end = stream, 0, 0

    def read(self, size: int) -> bytes:
        data = self.stream.read(size)
        self.given += len(data)
        self.asked_at_end += not data
        if self.asked_at_end > self.MOST_AT_END:
            raise EOFError("a member is longer than the file")
        return data


class _Member(tarfile.TarInfo):
    """Remembers why the walk over a tar ended: tarfile takes a broken header for the end and says nothing."""

    @classmethod
    def fromtarfile(cls, tar):
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            tar.ended_by = error
            raise


def scan_shard(shard: str, keys: Keys = FROM_MEMBERS, images: bool = True) -> Index:
    """The index of one shard, read from its first byte to its last. Raises UserError as `build_index` does.

    Without `images`, for local shards, the images are skipped: their checksums are 0, and only headers, labels and
    captions are read.
    """
    samples = _Samples(shard, keys, images)
    mtime = -1 if is_remote(shard) else _mtime(shard)
    try:
        with open_shard(shard) as stream:
            counted = _Counted(stream)
            opened = {"fileobj": counted, "mode": "r|"} if images else {"fileobj": stream, "mode": "r:"}
            with tarfile.open(tarinfo=_Member, **opened) as tar:
                read = _reading(tar, None if images else stream)
                for member in tar:
                    samples.add(member, read)
                    tar.members = []
                if not isinstance(tar.ended_by, tarfile.EOFHeaderError):
                    raise tarfile.ReadError("no end-of-archive marker")
            while images and counted.read(1 << 20):
                pass
            size = counted.given if images else os.fstat(stream.fileno()).st_size
    except OSError as error:
        raise UserError(f"shard '{shard}' cannot be read: {error.strerror or error}; correct data.shards") from None
    except UserError:
        raise
    except (tarfile.TarError, ValueError, OverflowError, MemoryError, EOFError, AttributeError, KeyError) as error:
        # Damaged headers of the extended formats end in whatever tarfile meets first.
        what = "is truncated or damaged" if samples.found else "is truncated, damaged, or not a plain tar"
        if not samples.found and (packed := _packed_by(shard)):
            raise UserError(f"shard '{shard}' is compressed; unpack it: {packed}") from None
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"shard '{shard}' {what} ({why}); restore the file, or extract and write it anew") from None
    return samples.index(size, mtime)


def _packed_by(shard: str) -> str | None:
    """The command line that unpacks a local shard that a program has compressed; None: none has."""
    if is_remote(shard):
        return None
    with open(shard, "rb") as file:
        start = file.read(6)
    for magic, program in (
        (b"\x1f\x8b", "gzip"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"\xfd7zXZ\0", "xz"),
        (b"BZh", "bzip2"),
    ):
        if start.startswith(magic):
            name = shlex.quote(shard)
            return f"{program} -dc {name} > {name}.plain && mv {name}.plain {name}"
    return None


def _reading(tar: tarfile.TarFile, file: BinaryIO | None) -> Callable[[tarfile.TarInfo], bytes]:
    """What reads a member's bytes: tarfile where the tar is a stream, else a seek in `file`, many times as fast."""
    if file is None:
        return lambda member: tar.extractfile(member).read()

    def read(member: tarfile.TarInfo) -> bytes:
        file.seek(member.offset_data)
        return file.read(member.size)

    return read


def _mtime(shard: str) -> int:
    try:
        return os.stat(shard).st_mtime_ns
    except OSError:
        return -1  # opening it tells why


class _Samples:
    """The samples of a shard as they are met, and what was met beside them."""

    def __init__(self, shard: str, keys: Keys, images: bool):
        self.shard, self.keys, self.images = shard, keys, images
        self.found: dict[bytes, dict] = {}
        self.remarks: dict[str, list] = {}

    def add(self, member: tarfile.TarInfo, read: Callable[[tarfile.TarInfo], bytes]) -> None:
        """Take a member into its sample, or count it among what is not read."""
        if member.isdir() or re.match(r"__[^/]*__($|/)", member.name):  # webdataset's own entries
            return
        if not member.isreg():
            return self._remark("links and special files, which hold no data of their own", member.name)
        # webdataset's rules: a key ends at the first dot of the base name.
        match = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", member.name)
        if not match:
            return self._remark("files whose name has no extension or begins with a dot", member.name)
        if member.issparse():
            raise UserError(
                f"shard '{self.shard}': member '{member.name}' is a sparse file; write the tar without --sparse"
            )
        key, extension = match[1].encode("utf-8", "surrogateescape"), match[2].lower()
        last = next(reversed(self.found), None)
        if key not in self.found:
            self.found[key] = {"members": set()}
        elif key != last or extension in self.found[key]["members"]:
            raise UserError(
                f"shard '{self.shard}': key '{match[1]}' occurs twice; a key names one sample, its members side by side"
            )
        sample = self.found[key]
        sample["members"].add(extension)
        kind = "image" if extension in EXTENSIONS else extension
        looked_into = kind != "json" or self.keys != FROM_MEMBERS
        if looked_into and member.size > MOST_BYTES.get(kind, member.size):
            size = size_in_words(MOST_BYTES[kind])
            return self._remark(f".{extension} members of more than {size}, which are not looked into", member.name)
        self._take(sample, extension, member, read)

    def _take(self, sample: dict, extension: str, member: tarfile.TarInfo, read: Callable) -> None:
        if extension in EXTENSIONS:
            if "image" in sample:
                return self._remark("second images of a sample", member.name)
            crc = zlib.crc32(read(member)) if self.images else 0
            sample["image"] = (member.offset_data, member.size, crc, EXTENSIONS.index(extension))
        elif extension == "cls" and self.keys.label is None:
            sample["label"] = self._label(read(member), member.name)
        elif extension == "txt" and self.keys.caption is None:
            data = read(member)
            sample["text"] = (member.offset_data, member.size, zlib.crc32(data))
            if "\ufffd" in data.decode("utf-8", "replace"):
                self._remark("captions with characters that are not UTF-8", member.name)
        elif extension == "json" and self.keys != FROM_MEMBERS:
            data = read(member)
            if self.keys.label is not None and (value := json_value(data, self.keys.label)) is not None:
                sample["label"] = self._label(str(value).encode(), member.name)
            if self.keys.caption is not None:
                sample["text"] = (member.offset_data, member.size, zlib.crc32(data))
        elif extension in OTHER_IMAGES:
            self._remark(f".{extension} images, of a kind that is not read ({', '.join(EXTENSIONS)} are)", member.name)
        elif extension.rpartition(".")[2] in EXTENSIONS:
            self._remark("images with more than one dot in their name, whose first dot ends the key", member.name)
        elif "cls" in extension.split(".") and extension != "cls":
            self._remark("labels with more than one dot in their name, whose first dot ends the key", member.name)

    def _label(self, text: bytes, name: str) -> tuple[int, int]:
        if re.fullmatch(rb"\s*\d{1,18}\s*", text):
            return int(text), LABEL_OK
        shown = text[:40].decode("utf-8", "replace").strip()
        self.remarks.setdefault(EXAMPLES, [1, f"{_shown(shown)} in {_shown(name)}"])
        return -1, LABEL_BAD

    def _remark(self, what: str, name: str) -> None:
        self.remarks.setdefault(what, [0, _shown(name)])[0] += 1

    def index(self, size: int, mtime: int) -> Index:
        """All of it as arrays. Raises UserError where no sample has an image."""
        kept = {key: s for key, s in self.found.items() if "image" in s}
        if not kept:
            met = "".join(
                f"; {n} {what} (such as {like})" for what, (n, like) in self.remarks.items() if what != EXAMPLES
            )
            raise UserError(
                f"shard '{self.shard}' has no sample with an image ({', '.join(EXTENSIONS)}){met}; "
                "rename its members, or remove it from data.shards"
            )
        pictures = np.array([s["image"] for s in kept.values()], dtype=np.int64)
        labels = np.array([s.get("label", (-1, LABEL_MISSING)) for s in kept.values()], dtype=np.int64)
        texts = np.array([s.get("text", (0, -1, 0)) for s in kept.values()], dtype=np.int64)
        return Index(
            shard_names=np.array([shard_name(self.shard).encode("utf-8", "replace").decode()]),
            shard_sizes=np.array([size], dtype=np.int64),
            shard_mtimes=np.array([mtime], dtype=np.int64),
            shard_counts=np.array([len(kept)], dtype=np.int64),
            imageless=np.array([len(self.found) - len(kept)], dtype=np.int64),
            remarks=np.array([json.dumps(self.remarks)]),
            keys=np.array(list(kept), dtype=np.bytes_),
            image_offset=pictures[:, 0],
            image_size=pictures[:, 1],
            image_crc=pictures[:, 2].astype(np.uint32),
            extension=pictures[:, 3].astype(np.uint8),
            labels=labels[:, 0],
            label_status=labels[:, 1].astype(np.uint8),
            text_offset=texts[:, 0],
            text_size=texts[:, 1],
            text_crc=texts[:, 2].astype(np.uint32),
            json_keys=np.array([self.keys.label or "", self.keys.caption or ""], dtype=np.str_),
        )


def json_value(data: bytes, key: str):
    """The value of a key in a JSON object; None where there is none, or the bytes are no such object."""
    try:
        parsed = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return parsed.get(key) if isinstance(parsed, dict) else None


def _shown(text: str) -> str:
    """A text of others on one line, quoted, short."""
    return ascii(text[:60]) if not text[:60].isprintable() else f"'{text[:60]}'"
