"""Stored image embeddings of one teacher on one data set, read row by row beside the images they were made from.

A store is a folder: `part-N.safetensors` with the embeddings of consecutive samples, each published by rename, and, written last,
`manifest.json`. Every embedding has a checksum that is checked whenever it is read. Training with a fixed number of stored
augmentations follows dataset reinforcement (Faghri et al., ICCV 2023, "Reinforce Data, Multiply Impact").
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import UserError
from ..files import publish
from .settings import MANIFEST, manifests

FORMAT = 1
PART_ROWS, LEAST_PARTS, LEAST_SAMPLES = (
    4096,
    64,
    64,
)  # what an interruption may cost, work for many ranks, no swarm of tiny files
MAX_OPEN = 256
NONE = -1  # the checksum of a sample without an embedding


@dataclass(frozen=True)
class PartLayout:
    """How `samples` samples of `views` embeddings each lie in files: sample i in part i // `part_samples`."""

    samples: int
    views: int

    @property
    def part_samples(self) -> int:
        return max(1, min(PART_ROWS // self.views, max(LEAST_SAMPLES, -(-self.samples // LEAST_PARTS))))

    @property
    def parts(self) -> int:
        return -(-self.samples // self.part_samples)

    def part(self, number: int) -> range:
        """The sample ids of a part."""
        return range(number * self.part_samples, min((number + 1) * self.part_samples, self.samples))


class EmbeddingStore:
    """The finished store in `folder`, as its manifest describes it. Every process that reads opens the files for itself.

    Raises UserError when a part is missing or of another size than the manifest says.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest = json.loads((folder / MANIFEST).read_text())
        self.layout = PartLayout(self.manifest["samples"], self.manifest["views"])
        for name, size in self.manifest["parts"].items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != size:
                raise UserError(f"stored embeddings '{path}' are missing or cut short; `mmtard cache` makes them again")
        self._open: OrderedDict[int, tuple[Tensor, Tensor]] = OrderedDict()

    def rows(self, samples: np.ndarray, views: np.ndarray) -> Tensor:
        """Samples int64 [b] and which view of each int64 [b] -> embeddings [b,D] float32, the bits that the teacher gave.

        Raises UserError for a damaged file, and for a sample that could not be read when the embeddings were stored.
        """
        return torch.stack([self._row(sample, view) for sample, view in zip(samples.tolist(), views.tolist())]).float()

    def _row(self, sample: int, view: int) -> Tensor:
        number, inside = divmod(sample, self.layout.part_samples)
        embeddings, checksums = self._part(number)
        row, crc = embeddings[inside, view], int(checksums[inside, view])
        if checksum(row) != crc:
            why = "is damaged" if crc != NONE else "is absent, its image could not be read"
            raise UserError(
                f"stored embeddings '{self.folder / part_name(number)}': that of sample number {sample} {why}; `mmtard cache` makes them again"
            )
        return row

    def _part(self, number: int) -> tuple[Tensor, Tensor]:
        part = self._open.pop(number, None)
        if part is None:
            if len(self._open) >= MAX_OPEN:
                self._open.popitem(last=False)
            try:
                with safe_open(self.folder / part_name(number), "pt") as file:  # memory-mapped
                    part = file.get_tensor("embeddings"), file.get_tensor("checksums")
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"stored embeddings '{self.folder / part_name(number)}' cannot be read: {error}; `mmtard cache` makes them again"
                ) from None
        self._open[number] = part
        return part


def part_name(number: int) -> str:
    return f"part-{number:06d}.safetensors"


def checksum(row: Tensor) -> int:
    """CRC-32 of an embedding's bytes."""
    return zlib.crc32(row.contiguous().view(torch.uint8).numpy())


def settings_digest(identity: dict) -> str:
    """The name of the folder, inside the folder of all stores, of the embeddings that `identity` describes."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def write_part(folder: Path, number: int, embeddings: Tensor, readable: Tensor) -> None:
    """Publish one part: embeddings [n,K,D] of its n samples, of which those not `readable` (bool [n]) have none."""
    crc = torch.tensor(
        [[checksum(row) if ok else NONE for row in views] for views, ok in zip(embeddings, readable.tolist())]
    )
    with publish(folder / part_name(number)) as temporary:
        temporary.write_bytes(save({"embeddings": embeddings.contiguous(), "checksums": crc}))


def missing_parts(folder: Path, layout: PartLayout, numbers: range) -> list[int]:
    """Those of the parts `numbers` that are absent, or of which any embedding differs from its checksum."""
    return [
        number for number in numbers if not _whole(folder / part_name(number), len(layout.part(number)), layout.views)
    ]


def _whole(path: Path, samples: int, views: int) -> bool:
    try:
        with safe_open(path, "pt") as file:
            embeddings, crc = file.get_tensor("embeddings"), file.get_tensor("checksums")
    except (OSError, SafetensorError):
        return False
    if embeddings.shape[:2] != (samples, views) or crc.shape != (samples, views):
        return False
    return all(c == NONE or checksum(row) == c for row, c in zip(embeddings.flatten(0, 1), crc.flatten().tolist()))


def finish(folder: Path, layout: PartLayout, identity: dict, more: dict) -> None:
    """Publish the manifest of a folder whose parts are all there."""
    sizes = {part_name(n): (folder / part_name(n)).stat().st_size for n in range(layout.parts)}
    manifest = {"identity": identity, "samples": layout.samples, "views": layout.views, **more, "parts": sizes}
    with publish(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1) + "\n")


def find_store(folder: Path, identity: dict, what: str) -> Path:
    """The finished store in `folder` that holds the embeddings of `identity`.

    Raises UserError, which begins with `what`, saying in what the nearest store differs.
    """
    path = folder / settings_digest(identity)
    found = manifests(folder)
    if path in found:
        return path
    if any(path.glob("part-*")):
        raise UserError(f"{what}: '{path}' is not complete; let `mmtard cache` finish it")
    if not found:
        raise UserError(
            f"{what}: '{folder}' holds no stored embeddings; run `mmtard cache` with this configuration first"
        )
    differing = {other: _differences(manifest["identity"], identity) for other, manifest in found.items()}
    nearest = min(differing, key=lambda other: (len(differing[other]), str(other)))
    told = "; ".join(f"{name}: stored {then}, now {now}" for name, (then, now) in differing[nearest].items())
    raise UserError(
        f"{what}: no embeddings stored in '{folder}' match, those in '{nearest.name}' differ in {told}; restore that, or run `mmtard cache` with this configuration"
    )


def _differences(stored: dict, asked: dict) -> dict[str, tuple[str, str]]:
    def show(value) -> str:
        return value[:16] if isinstance(value, str) else json.dumps(value)

    names = [name for name in (*asked, *(n for n in stored if n not in asked)) if stored.get(name) != asked.get(name)]
    return {name: (show(stored.get(name)), show(asked.get(name))) for name in names}
