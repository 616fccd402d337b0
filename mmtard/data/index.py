"""A side index of plain WebDataset tars: where each sample's members lie, so that any sample can be read alone."""

import hashlib
import re
import tarfile
import zipfile
import zlib
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import UserError
from ..files import publish
from .openers import open_shard
from .paths import is_remote
from .worker_pool import map_in_processes

FORMAT = 1
EXTENSIONS = ("jpg", "jpeg", "png", "webp")
LABEL_OK, LABEL_MISSING, LABEL_BAD = 0, 1, 2


@dataclass(frozen=True)
class Index:
    """The samples of a list of shards, as arrays; N samples in S shards, in the order of the shards and of their members.

    `keys` S-bytes [N]; `image_offset`, `image_size`, `text_offset`, `text_size` int64 [N] in bytes from the shard's start (sizes of
    absent captions are -1); `image_crc` uint32 [N]; `extension` uint8 [N] into EXTENSIONS; `labels` int64 [N], -1 where
    `label_status` uint8 [N] is LABEL_MISSING or LABEL_BAD; `shard_names` str [S]; `shard_sizes` in bytes and `shard_counts`
    int64 [S]; `imageless` int64 [S], samples left out for want of an image.
    """

    shard_names: np.ndarray
    shard_sizes: np.ndarray
    shard_counts: np.ndarray
    imageless: np.ndarray
    keys: np.ndarray
    image_offset: np.ndarray
    image_size: np.ndarray
    image_crc: np.ndarray
    extension: np.ndarray
    labels: np.ndarray
    label_status: np.ndarray
    text_offset: np.ndarray
    text_size: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 hex of the samples' names, sizes, checksums and labels; the same wherever the shards lie."""
        digest = hashlib.sha256()
        digest.update("\n".join(map(str, self.shard_names)).encode())
        digest.update(b"\0" + b"\n".join(self.keys.tolist()))
        for array in (self.shard_sizes, self.shard_counts, self.image_size, self.image_crc, self.labels):
            digest.update(array.astype("<i8").tobytes())
        return digest.hexdigest()

    def summary(self) -> str:
        """One line: samples, shards, and what is not as it should be."""
        missing, bad = (int((self.label_status == s).sum()) for s in (LABEL_MISSING, LABEL_BAD))
        notes = [
            f"{n} {what}"
            for n, what in (
                (int(self.imageless.sum()), "left out without an image"),
                (missing, "without a label"),
                (bad, "with a label that is not an integer"),
            )
            if n
        ]
        return f"{len(self)} samples in {len(self.shard_names)} shards" + (f" ({', '.join(notes)})" if notes else "")


def build_index(shards: list[str], out: Path, jobs: int | None = None, progress: bool = True) -> Index:
    """Read every shard once, local or through webdataset's opener, and publish the index at `out`.

    Raises UserError naming the shard that is empty, truncated, not a plain tar, unreadable, or holds a key twice.
    """
    parts = map_in_processes(scan_shard, list(shards), jobs, "index", progress)
    index = Index(**{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Index)})
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        with publish(Path(out)) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(
                file, format=np.int64(FORMAT), **{f.name: getattr(index, f.name) for f in fields(Index)}
            )
    except OSError as error:
        raise UserError(
            f"cannot write the index '{out}': {error.strerror}; name another file (`mmtard index SHARDS --out FILE`, data.index)"
        ) from None
    return index


def load_index(path: Path) -> Index:
    """The index at `path`. Raises UserError when it is not an index, or FileNotFoundError."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if (found := int(arrays["format"])) != FORMAT:
                raise UserError(
                    f"index '{path}' has format {found}, this version reads {FORMAT}; run `mmtard index SHARDS --out {path}` again"
                )
            return Index(**{f.name: arrays[f.name] for f in fields(Index)})
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"'{path}' is not an index ({error}); run `mmtard index SHARDS --out {path}` again") from None


def shard_name(shard: str) -> str:
    """The file name of a shard: `0001.tar` of `/data/0001.tar` and of `pipe:aws s3 cp s3://bucket/0001.tar -`."""
    names = re.findall(r"[^/\s:=?&'\"]+\.tar(?![\w.])", shard) if is_remote(shard) else []
    return names[-1] if names else Path(shard).name


class _Counted:
    """A stream that knows how many bytes it has given."""

    def __init__(self, stream: BinaryIO):
        self.stream, self.given = stream, 0

    def read(self, size: int) -> bytes:
        data = self.stream.read(size)
        self.given += len(data)
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


def scan_shard(shard: str) -> Index:
    """The index of one shard, read from its first byte to its last. Raises UserError as `build_index` does."""
    samples: dict[bytes, dict] = {}
    try:
        with open_shard(shard) as stream:
            counted = _Counted(stream)
            with tarfile.open(fileobj=counted, mode="r|", tarinfo=_Member) as tar:
                for member in tar:
                    _add(member, tar, samples, shard)
                    tar.members = []
                if not isinstance(tar.ended_by, tarfile.EOFHeaderError):
                    raise tarfile.ReadError("no end-of-archive marker")
            while counted.read(1 << 20):
                pass
    except tarfile.ReadError as error:
        what = "is truncated or damaged" if samples else "is truncated, damaged, or not a plain tar"
        raise UserError(f"shard '{shard}' {what} ({error}); restore the file, or extract and write it anew") from None
    except OSError as error:
        raise UserError(f"shard '{shard}' cannot be read: {error.strerror or error}; correct data.shards") from None
    kept = {key: s for key, s in samples.items() if "image" in s}
    if not kept:
        raise UserError(
            f"shard '{shard}' has no sample with an image ({', '.join(EXTENSIONS)}); remove it from data.shards"
        )
    return _arrays(shard, counted.given, kept, len(samples) - len(kept))


def _add(member: tarfile.TarInfo, tar: tarfile.TarFile, samples: dict[bytes, dict], shard: str) -> None:
    # webdataset's rules: a key ends at the first dot of the base name; __name__ entries are not samples.
    match = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", member.name)
    if not member.isreg() or not match or re.match(r"__[^/]*__($|/)", member.name):
        return
    if member.issparse():
        raise UserError(f"shard '{shard}': member '{member.name}' is a sparse file; write the tar without --sparse")
    key, extension = match[1].encode("utf-8", "surrogateescape"), match[2].lower()
    last = next(reversed(samples), None)
    if key not in samples:
        samples[key] = {"members": set()}
    elif key != last or extension in samples[key]["members"]:
        raise UserError(
            f"shard '{shard}': key '{match[1]}' occurs twice; a key names one sample, its members side by side"
        )
    sample = samples[key]
    sample["members"].add(extension)
    if extension in EXTENSIONS and "image" not in sample:
        data = tar.extractfile(member).read()
        sample["image"] = (member.offset_data, member.size, zlib.crc32(data), EXTENSIONS.index(extension))
    elif extension == "cls":
        text = tar.extractfile(member).read()
        sample["label"] = (int(text), LABEL_OK) if re.fullmatch(rb"\s*\d{1,18}\s*", text) else (-1, LABEL_BAD)
    elif extension == "txt":
        sample["text"] = (member.offset_data, member.size)


def _arrays(shard: str, size: int, samples: dict[bytes, dict], imageless: int) -> Index:
    images = np.array([s["image"] for s in samples.values()], dtype=np.int64)
    labels = np.array([s.get("label", (-1, LABEL_MISSING)) for s in samples.values()], dtype=np.int64)
    texts = np.array([s.get("text", (0, -1)) for s in samples.values()], dtype=np.int64)
    return Index(
        shard_names=np.array([shard_name(shard)]),
        shard_sizes=np.array([size], dtype=np.int64),
        shard_counts=np.array([len(samples)], dtype=np.int64),
        imageless=np.array([imageless], dtype=np.int64),
        keys=np.array(list(samples), dtype=np.bytes_),
        image_offset=images[:, 0],
        image_size=images[:, 1],
        image_crc=images[:, 2].astype(np.uint32),
        extension=images[:, 3].astype(np.uint8),
        labels=labels[:, 0],
        label_status=labels[:, 1].astype(np.uint8),
        text_offset=texts[:, 0],
        text_size=texts[:, 1],
    )
