"""Encoded images as splits of a study: no sample is in two, each is even over the classes; shards with class names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import webdataset as wds
from rich.progress import track

from ..errors import UserError

SHARD = 5000


@dataclass(frozen=True)
class Images:
    """Encoded images of a source, by their places in it, and the names of their classes; captions where it has them."""

    read: Callable[[int], bytes]  # the image at a place
    places: np.ndarray  # int64 [N]
    kinds: np.ndarray  # str [N], the extensions: webp, png, jpg
    labels: np.ndarray  # int64 [N]
    classes: list[str]
    caption: Callable[[int], str] = lambda place: ""  # the caption at a place, empty where there is none

    @classmethod
    def of(cls, read: Callable[[int], bytes], kinds: list[str], labels: np.ndarray, classes: list[str]) -> Images:
        """All images of a source."""
        return cls(read, np.arange(len(labels)), np.array(kinds, dtype=str), labels, classes)

    def take(self, ids: np.ndarray) -> Images:
        """Those of these ids, 0..N-1, in this order."""
        return replace(self, places=self.places[ids], kinds=self.kinds[ids], labels=self.labels[ids])


def divide(
    name: str, train: Images, test: Images | None, n: int, rng: np.random.Generator
) -> tuple[Images, Images, Images]:
    """(training, validation, test images): n for validation, all even over the classes.

    Where there are no test images, test takes 2 n of the training images. Raises UserError where they do not suffice,
    or leave none of a class to train on.
    """
    order = spread(train.labels, rng)
    if len(order) <= (n if test is not None else 3 * n):
        parts = f"{n} for validation" + ("" if test is not None else f" and twice as many for test, {3 * n} in all,")
        of = f"of the {len(order)} images of {name}"
        raise UserError(f"data.options.validation: {parts} {of} leave none to train on; ask for fewer")
    held, rest = order[:n], order[n:]
    if test is None:
        test, rest = train.take(np.sort(rest[: 2 * n])), rest[2 * n :]
    for label in np.setdiff1d(train.labels, train.labels[rest])[:1].tolist():
        has = int((train.labels == label).sum())
        raise UserError(
            f"data.options.validation: {n} leaves no image of class '{train.classes[label]}' of {name} to train on, "
            f"which has {has}; ask for fewer, or leave that class out"
        )
    return train.take(np.sort(rest)), train.take(np.sort(held)), test


def spread(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Every place in a random order in which any first n are even over the classes."""
    shuffled = rng.permutation(len(labels))
    turn, seen = np.empty(len(labels), dtype=np.int64), {}
    for i, label in enumerate(labels[shuffled].tolist()):
        turn[i] = seen[label] = seen.get(label, -1) + 1
    return shuffled[np.argsort(turn, kind="stable")]


def write_split(parts: list[Images], folder: Path) -> None:
    """Write images, with their captions, as shards, and the names of all classes end to end."""
    folder.mkdir(parents=True)
    names = [name for part in parts for name in part.classes]
    first, i = 0, 0
    with wds.ShardWriter(str(folder / "%d.tar"), maxcount=SHARD, verbose=0) as shards:
        for part in parts:
            samples = list(zip(part.places.tolist(), part.kinds.tolist(), part.labels.tolist()))
            for place, kind, label in track(samples, description=f"writing {folder.parent.name}/{folder.name}"):
                sample = {"__key__": f"{i:06d}", kind: part.read(place), "cls": str(first + label).encode()}
                if caption := part.caption(place):
                    sample["txt"] = caption
                shards.write(sample)
                i += 1
            first += len(part.classes)
    (folder / "classnames.txt").write_text("\n".join(names) + "\n")
