"""A side index of plain WebDataset tars: where each sample's members lie, so that any sample can be read alone."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..files import publish

FORMAT = 2
EXTENSIONS = ("jpg", "jpeg", "png", "webp")
LABEL_OK, LABEL_MISSING, LABEL_BAD = 0, 1, 2
EXAMPLES = "examples of labels that are no class number"
# A million samples take 80 MB, and some 2 to 30 MB on disk.
MOST_BYTES, MOST_RATIO = 2**30, 300


class OldIndexError(UserError):
    """An index of a format that this version no longer reads."""


@dataclass(frozen=True)
class Keys:
    """From which keys of a sample's .json member its label and captions are read; None: from .cls and .txt members."""

    label: str | None = None
    caption: str | None = None


FROM_MEMBERS = Keys()


@dataclass(frozen=True)
class Index:
    """The samples of a list of shards as arrays: N samples in S shards, in the order of the shards and their members.

    `keys` S-bytes [N]; `image_offset`, `image_size`, `text_offset`, `text_size` int64 [N] in bytes from the shard's
    start (sizes of absent captions are -1); `image_crc`, `text_crc` uint32 [N]; `extension` uint8 [N] into EXTENSIONS;
    `labels` int64 [N], -1 where `label_status` uint8 [N] is LABEL_MISSING or LABEL_BAD; `shard_names` str [S];
    `shard_sizes` in bytes, `shard_mtimes` in nanoseconds (-1 behind an opener) and `shard_counts` int64 [S];
    `imageless` int64 [S], samples left out for want of an image; `remarks` str [S], JSON: what else was not read ->
    [how many, an example]; `json_keys` str [2]: the Keys, empty for None.
    """

    shard_names: np.ndarray
    shard_sizes: np.ndarray
    shard_mtimes: np.ndarray
    shard_counts: np.ndarray
    imageless: np.ndarray
    remarks: np.ndarray
    keys: np.ndarray
    image_offset: np.ndarray
    image_size: np.ndarray
    image_crc: np.ndarray
    extension: np.ndarray
    labels: np.ndarray
    label_status: np.ndarray
    text_offset: np.ndarray
    text_size: np.ndarray
    text_crc: np.ndarray
    json_keys: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def read_by(self) -> Keys:
        """The keys of .json members that labels and captions were read from."""
        return Keys(*(str(key) or None for key in self.json_keys))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 hex of the samples' names, images, labels and captions; the same wherever the shards lie."""
        digest = hashlib.sha256()
        digest.update("\n".join(map(str, self.shard_names)).encode())
        digest.update(b"\0" + b"\n".join(self.keys.tolist()))
        arrays = [self.shard_sizes, self.shard_counts, self.image_size, self.image_crc, self.labels]
        if (self.text_size >= 0).any():
            arrays += [self.text_size, self.text_crc]
        for array in arrays:
            digest.update(array.astype("<i8").tobytes())
        return digest.hexdigest()

    def shard(self, number: int) -> Index:
        """The index of one shard alone."""
        ends = np.cumsum(self.shard_counts)
        samples = slice(int(ends[number] - self.shard_counts[number]), int(ends[number]))
        parts = {name: getattr(self, name)[number : number + 1] for name in PER_SHARD}
        parts |= {name: getattr(self, name)[samples] for name in PER_SAMPLE}
        return replace(self, **parts)

    def not_read(self) -> dict[str, tuple[int, str]]:
        """What the shards hold and is not read: what it is -> (how many, an example)."""
        return {what: met for what, met in _together(self.remarks).items() if what != EXAMPLES}

    def notes(self, labels: bool = True) -> list[str]:
        """What of the shards was not used and why, a phrase each. labels: also samples without a usable label."""
        missing, bad = (int((self.label_status == s).sum()) for s in (LABEL_MISSING, LABEL_BAD))
        _, example = _together(self.remarks).get(EXAMPLES, (0, None))
        counted = [(int(self.imageless.sum()), "left out without an image")]
        if labels:
            such = f" (such as {example})" if example else ""
            counted += [(missing, "without a label"), (bad, f"with a label that is not an integer{such}")]
        notes = [f"{n} {what}" for n, what in counted if n]
        return notes + [f"not read: {n} {what} (such as {like})" for what, (n, like) in self.not_read().items()]

    def summary(self) -> str:
        """One line: samples, shards, and what was not used and why."""
        notes = ", ".join(self.notes())
        return f"{len(self)} samples in {len(self.shard_names)} shards" + (f" ({notes})" if notes else "")


PER_SHARD = ("shard_names", "shard_sizes", "shard_mtimes", "shard_counts", "imageless", "remarks")
PER_SAMPLE = tuple(f.name for f in fields(Index) if f.name not in (*PER_SHARD, "json_keys"))


def _together(remarks: Sequence[str]) -> dict[str, tuple[int, str]]:
    """The remarks of several shards as one: what -> (how many, the first example)."""
    all_: dict[str, tuple[int, str]] = {}
    for text in remarks:
        for what, (count, example) in json.loads(str(text)).items():
            had, first = all_.get(what, (0, example))
            all_[what] = had + count, first
    return all_


def write_index(index: Index, out: Path) -> None:
    """Publish an index at `out`. Raises OSError."""
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with publish(Path(out)) as temporary, open(temporary, "xb") as file:
        np.savez_compressed(file, format=np.int64(FORMAT), **{f.name: getattr(index, f.name) for f in fields(Index)})


def refuse_other_file(path: Path) -> None:
    """Raise UserError for a file that an index would replace and that is none, whole or damaged."""
    if not os.path.lexists(path):
        return
    other = not path.is_file()
    if not other:
        try:
            with np.load(path, allow_pickle=False) as arrays:
                other = not {"format", "shard_names"} <= set(arrays.files)
        except Exception:  # no archive of arrays, or a damaged one
            with open(path, "rb") as file:
                other = file.read(2) not in (b"", b"PK")
    if other:
        raise UserError(f"'{path}' is there and is no index; name another file")


def load_index(path: Path) -> Index:
    """The index at `path`. Raises UserError when it is not an index or damaged, or FileNotFoundError."""
    again = f"run `mmtard index SHARDS --out {path}` again"
    if path.exists() and not path.is_file():
        raise UserError(f"'{path}' is not an index but a folder, pipe or device; remove it")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            _refuse_bomb(arrays.zip)
            if (found := int(arrays["format"])) != FORMAT:
                raise OldIndexError(f"index '{path}' has format {found}, this version reads {FORMAT}; {again}")
            index = Index(**{f.name: arrays[f.name] for f in fields(Index)})
        _check_arrays(index)
    except (FileNotFoundError, UserError):
        raise
    except Exception as error:  # a damaged archive ends in whatever zipfile, zlib and numpy meet first
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"'{path}' is not an index ({why}); {again}") from None
    return index


def _refuse_bomb(archive: zipfile.ZipFile) -> None:
    """Raises ValueError for arrays that take far more memory than an index of that size on disk does."""
    members = archive.infolist()
    unpacked, packed = sum(m.file_size for m in members), sum(m.compress_size for m in members)
    if unpacked > max(MOST_BYTES, MOST_RATIO * packed):
        raise ValueError(f"its arrays take {unpacked / 1e9:.3g} GB, of {packed / 1e6:.3g} MB on disk")


def _check_arrays(index: Index) -> None:
    """Raises ValueError where the arrays do not fit one another: an offset read from them is used as it stands."""
    n, s = len(index.labels), len(index.shard_names)
    for name in (*PER_SHARD, *PER_SAMPLE):
        array, kind = getattr(index, name), KINDS.get(name, "iu")
        if array.shape != ((s,) if name in PER_SHARD else (n,)) or array.dtype.kind not in kind:
            raise ValueError(f"its {name} do not fit")
    if index.json_keys.shape != (2,) or index.json_keys.dtype.kind != "U":
        raise ValueError("its json_keys do not fit")
    if not n or (index.shard_counts < 0).any() or int(index.shard_counts.sum()) != n:
        raise ValueError("its counts do not fit")
    of_shard = np.repeat(index.shard_sizes, index.shard_counts)
    for kind in ("image", "text"):
        offset, size = getattr(index, f"{kind}_offset"), getattr(index, f"{kind}_size")
        if (offset < 0).any() or (size < -1).any() or (size > of_shard - offset).any():
            raise ValueError(f"its {kind}s do not fit in their shards")
    if (index.image_size < 0).any() or (index.extension >= len(EXTENSIONS)).any() or (index.labels < -1).any():
        raise ValueError("its values do not fit")
    _together(index.remarks)


KINDS = {"shard_names": "U", "remarks": "U", "keys": "S"}


def difference(indexed: Index, found: Index, images: bool) -> str | None:
    """What differs between one shard as it was indexed and as it is now; None where nothing does.

    Without `images` their bytes were not read, and their checksums are not compared.
    """
    same = len(indexed) == len(found) and all(
        np.array_equal(getattr(indexed, name), getattr(found, name)) for name in ("keys", "extension")
    )
    if not same:
        return "its samples"
    different = {
        "labels": (indexed.labels != found.labels) | (indexed.label_status != found.label_status),
        "captions": (indexed.text_size != found.text_size) | (indexed.text_crc != found.text_crc),
        "images": (indexed.image_size != found.image_size) | (images & (indexed.image_crc != found.image_crc)),
    }
    for what, differs in different.items():
        if differs.any():
            return f"the {what} of {int(differs.sum())} samples"
    if (indexed.image_offset != found.image_offset).any() or (indexed.text_offset != found.text_offset).any():
        return "the places of its members"
    return None
