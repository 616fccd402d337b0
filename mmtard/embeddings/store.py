"""Stored image embeddings of one teacher on one data set, read row by row beside the images they were made from.

A store is a folder: `part-N.safetensors` with the embeddings of consecutive samples, each published by rename, and,
written last, `manifest.json`. Every embedding has a checksum that is checked whenever it is read, and every part says
which part of which store it is. Training with a fixed number of stored augmentations follows dataset reinforcement
(Faghri et al., ICCV 2023, "Reinforce Data, Multiply Impact").
"""

from __future__ import annotations

import json
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import UserError
from ..files import publish, settings_digest, write_text
from ..models.image_tower import why_no_embeddings
from .settings import MANIFEST, manifests, read_manifest

FORMAT = 1
PART_ROWS = 4096  # Rows a file: the most work that an interruption loses.
LEAST_PARTS = 64  # Files at least: enough to share among many ranks.
LEAST_SAMPLES = 64  # Samples a file at least, so that a small data set is no swarm of tiny files.
MAX_OPEN = 256
# The one entry of a part's metadata: safetensors writes several in any order, and equal parts are equal bytes.
PLACE = "place"
NONE = -1  # the checksum of a sample without an embedding


@dataclass(frozen=True)
class PartLayout:
    """How `samples` samples of `views` embeddings each lie in files: sample i in part i // `part_samples`."""

    samples: int
    views: int

    @property
    def part_samples(self) -> int:
        """Samples a part holds; the last one may hold fewer."""
        return max(1, min(PART_ROWS // self.views, max(LEAST_SAMPLES, -(-self.samples // LEAST_PARTS))))

    @property
    def parts(self) -> int:
        """How many parts there are."""
        return -(-self.samples // self.part_samples)

    def part(self, number: int) -> range:
        """The sample ids of a part."""
        return range(number * self.part_samples, min((number + 1) * self.part_samples, self.samples))


class EmbeddingStore:
    """The finished store in `folder`, as its manifest describes it. Every process that reads opens its own files.

    Raises UserError when the manifest is damaged, or a part is missing or of another size than the manifest says.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        manifest = read_manifest(folder)
        if manifest is None:
            raise UserError(f"stored embeddings '{folder / MANIFEST}' is damaged; `mmtard cache` makes it again")
        self.manifest = manifest
        self.layout = PartLayout(manifest["samples"], manifest["views"])
        for name in (part_name(number) for number in range(self.layout.parts)):
            path = folder / name
            if not path.is_file() or path.stat().st_size != manifest["parts"].get(name):
                raise UserError(f"stored embeddings '{path}' are missing or cut short; `mmtard cache` makes them again")
        self._open: OrderedDict[int, tuple[Tensor, Tensor]] = OrderedDict()

    def rows(self, samples: np.ndarray, views: np.ndarray) -> Tensor:
        """Samples int64 [b], and which view of each int64 [b] -> embeddings [b,D] float32, the teacher's own bits.

        Raises UserError for a damaged file, for a part in another's place, for a sample that could not be read when the
        embeddings were stored, and for rows that are no embeddings (NaN, zero, all alike).
        """
        rows = torch.stack([self._row(sample, view) for sample, view in zip(samples.tolist(), views.tolist())]).float()
        reason = why_no_embeddings(rows, len(set(samples.tolist())))
        if reason:
            raise UserError(
                f"stored embeddings '{self.folder}' are {reason}; mend the teacher's weights, then let `mmtard cache`"
                " store them"
            )
        return rows

    def _row(self, sample: int, view: int) -> Tensor:
        number, inside = divmod(sample, self.layout.part_samples)
        embeddings, checksums = self._part(number)
        row, crc = embeddings[inside, view], int(checksums[inside, view])
        if checksum(row) != crc:
            reason = "is damaged" if crc != NONE else "is absent, its image could not be read"
            raise UserError(
                f"stored embeddings '{self.folder / part_name(number)}': that of sample number {sample} {reason};"
                " `mmtard cache` makes them again"
            )
        return row

    def _part(self, number: int) -> tuple[Tensor, Tensor]:
        part = self._open.pop(number, None)
        if part is None:
            if len(self._open) >= MAX_OPEN:
                self._open.popitem(last=False)
            try:
                part = _read_part(self.folder, number, self.layout)
            except ValueError as error:
                raise UserError(
                    f"stored embeddings '{self.folder / part_name(number)}' cannot be read: {error};"
                    " `mmtard cache` makes them again"
                ) from None
        self._open[number] = part
        return part


def part_name(number: int) -> str:
    """The file of a part in the store's folder."""
    return f"part-{number:06d}.safetensors"


def checksum(row: Tensor) -> int:
    """CRC-32 of an embedding's bytes."""
    return zlib.crc32(row.contiguous().view(torch.uint8).numpy())


def write_part(folder: Path, number: int, embeddings: Tensor, readable: Tensor) -> None:
    """Publish one part: embeddings [n,K,D] of its n samples, of which those not `readable` (bool [n]) have none.

    Raises OSError where it cannot be written.
    """
    crc = torch.tensor(
        [[checksum(row) if ok else NONE for row in views] for views, ok in zip(embeddings, readable.tolist())]
    )
    with publish(folder / part_name(number)) as temporary:
        tensors = {"embeddings": embeddings.contiguous(), "checksums": crc}
        temporary.write_bytes(save(tensors, {PLACE: f"{folder.name} {number}"}))


def missing_parts(folder: Path, layout: PartLayout, numbers: range) -> list[int]:
    """Those of the parts `numbers` that are absent, in another's place, or hold an embedding that is damaged."""
    return [number for number in numbers if not _is_whole(folder, number, layout)]


def finish(folder: Path, layout: PartLayout, identity: dict, origin: dict) -> None:
    """Publish the manifest of a folder whose parts are all there."""
    sizes = {part_name(n): (folder / part_name(n)).stat().st_size for n in range(layout.parts)}
    manifest = {"identity": identity, "samples": layout.samples, "views": layout.views, **origin, "parts": sizes}
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def find_store(folder: Path, identity: dict, what: str) -> Path:
    """The finished store in `folder` that holds the embeddings of `identity`.

    Raises UserError, which begins with `what`, saying in what the nearest store differs.
    """
    path = folder / settings_digest(identity)
    finished = manifests(folder)
    if path in finished:
        return path
    if any(path.glob("part-*")):
        raise UserError(f"{what}: '{path}' is not complete; let `mmtard cache` finish it")
    if not finished:
        raise UserError(
            f"{what}: '{folder}' holds no stored embeddings; run `mmtard cache` with this configuration first"
        )
    differing = {other: _differences(manifest["identity"], identity) for other, manifest in finished.items()}
    nearest = min(differing, key=lambda other: (len(differing[other]), str(other)))
    message = "; ".join(f"{name}: stored {then}, now {now}" for name, (then, now) in differing[nearest].items())
    raise UserError(
        f"{what}: no embeddings stored in '{folder}' match, those in '{nearest.name}' differ in {message};"
        " restore that, or run `mmtard cache` with this configuration"
    )


def _read_part(folder: Path, number: int, layout: PartLayout) -> tuple[Tensor, Tensor]:
    """(embeddings [n,K,D], checksums int64 [n,K]) of a part, memory-mapped.

    Raises ValueError that says what is wrong.
    """
    try:
        with safe_open(folder / part_name(number), "pt") as file:
            embeddings, checksums = file.get_tensor("embeddings"), file.get_tensor("checksums")
            said = file.metadata() or {}
    except Exception as error:  # safetensors raises of several families for a damaged header
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
    shape = (len(layout.part(number)), layout.views)
    if (
        embeddings.ndim != 3
        or embeddings.shape[:2] != shape
        or checksums.shape != shape
        or checksums.dtype != torch.int64
    ):
        raise ValueError(f"its embeddings have shape {tuple(embeddings.shape)}, not {shape} and a dimension")
    # Parts of versions that did not write their place say nothing.
    if said and said.get(PLACE) != f"{folder.name} {number}":
        store, _, part = said.get(PLACE, "? ?").partition(" ")
        raise ValueError(f"it is part {part} of store '{store}', copied to another's place")
    return embeddings, checksums


def _is_whole(folder: Path, number: int, layout: PartLayout) -> bool:
    try:
        embeddings, crc = _read_part(folder, number, layout)
    except ValueError:
        return False
    return all(c == NONE or checksum(row) == c for row, c in zip(embeddings.flatten(0, 1), crc.flatten().tolist()))


def _differences(stored: dict, requested: dict) -> dict[str, tuple[str, str]]:
    def show(value) -> str:
        return value[:16] if isinstance(value, str) else json.dumps(value)

    names = (*requested, *(name for name in stored if name not in requested))
    differing = [name for name in names if stored.get(name) != requested.get(name)]
    return {name: (show(stored.get(name)), show(requested.get(name))) for name in differing}
