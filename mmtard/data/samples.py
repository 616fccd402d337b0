"""Samples as tensors: what a loader worker reads, decodes and gives back as a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..seeding import sample_seeds
from .dataset import Dataset
from .images import DecodeError, Native, Transform, decode
from .reader import Reader
from .staging import Staging

LEFT_OUT = -1


@dataclass
class Batch:
    """b samples: `images` uint8 [b,3,H,W]; `labels`, `sample_ids`, `seeds` int64 [b]; `captions` str [b], empty where there is none.

    `sample_ids` name the samples whose images these are; `seeds` are uint64 bit patterns. `replaced` has (asked name, given name,
    reason) for each sample that could not be used; `left_out` has (name, reason) of those that no other replaced. `stored`: teacher ->
    its embeddings [b,D] float32 of these very images.
    """

    images: Tensor
    labels: Tensor
    sample_ids: Tensor
    seeds: Tensor
    captions: list[str]
    replaced: list[tuple[str, str, str]] = field(default_factory=list)
    teacher_embeddings: dict[str, Tensor] = field(default_factory=dict)
    left_out: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    def split(self, size: int) -> Iterator[Batch]:
        """The batch in parts of `size` samples, in order; the last part has what is left."""
        for i in range(0, len(self), size):
            part = slice(i, i + size)
            yield replace(
                self,
                images=self.images[part],
                labels=self.labels[part],
                sample_ids=self.sample_ids[part],
                seeds=self.seeds[part],
                captions=self.captions[part],
                teacher_embeddings={name: z[part] for name, z in self.teacher_embeddings.items()},
            )

    def to(self, device: torch.device) -> Batch:
        """The tensors that a model is given, on `device`; `sample_ids` stay on the CPU, for logs."""
        images, labels, seeds = (x.to(device, non_blocking=True) for x in (self.images, self.labels, self.seeds))
        embeddings = {name: z.to(device, non_blocking=True) for name, z in self.teacher_embeddings.items()}
        return replace(self, images=images, labels=labels, seeds=seeds, teacher_embeddings=embeddings)

    def pixels(self, device: torch.device) -> Tensor:
        """The images on `device`, float32 [b,3,H,W] in [0, 1]."""
        return self.images.to(device, non_blocking=True).float() / 255

    def pin_memory(self) -> Batch:
        return replace(
            self,
            images=self.images.pin_memory(),
            labels=self.labels.pin_memory(),
            sample_ids=self.sample_ids.pin_memory(),
            seeds=self.seeds.pin_memory(),
            teacher_embeddings={name: z.pin_memory() for name, z in self.teacher_embeddings.items()},
        )


class EmbeddingRows(Protocol):
    """Stored embeddings of one teacher, as `mmtard.embeddings` keeps them."""

    def rows(self, samples: np.ndarray, views: np.ndarray) -> Tensor:
        """The embeddings [b,D] float32 of samples int64 [b], each in its fixed view int64 [b]."""


class SampleRequest(NamedTuple):
    """What is asked of a loader: samples int64 [b], their seeds uint64 [b], and which fixed view of each (int64 [b]); None: the
    seeds decide the augmentation, too."""

    ids: np.ndarray
    seeds: np.ndarray
    views: np.ndarray | None


class SampleReader:
    """Request -> Batch, or the UserError that reading it met: raised in a worker it would become a traceback.

    `seed` decides what the fixed views look like. `replace`: a sample that cannot be used is replaced, else left out.
    """

    def __init__(
        self, dataset: Dataset, transform: Transform | Native, need_labels: bool, staging: Staging | None, need_captions: bool = False, *, seed: int = 0,
        stored: Mapping[str, EmbeddingRows] | None = None, replace: bool = True,
    ):  # fmt: skip
        self.dataset, self.transform, self.need_labels, self.need_captions = (
            dataset,
            transform,
            need_labels,
            need_captions,
        )
        self.seed, self.stored, self.replace = seed, stored or {}, replace
        self.reader = Reader(dataset, staging)

    def __getitem__(self, request: SampleRequest) -> Batch | UserError:
        try:
            return self._batch(*request)
        except UserError as error:
            return error

    def _batch(self, ids: np.ndarray, seeds: np.ndarray, views: np.ndarray | None) -> Batch:
        images = torch.empty((len(ids), 3, *self.transform.shape), dtype=torch.uint8)
        pixels, given, replaced, left_out = images.numpy(), np.empty(len(ids), dtype=np.int64), [], []
        for row, (asked, seed) in enumerate(zip(ids.tolist(), seeds.tolist())):
            given[row], pixels[row], reason = self._usable(asked, seed, None if views is None else views[row])
            if given[row] == LEFT_OUT:
                left_out.append((self.dataset.name(asked), reason))
            elif reason:
                replaced.append((self.dataset.name(asked), self.dataset.name(int(given[row])), reason))
        if left_out:
            there = np.flatnonzero(given != LEFT_OUT)
            images, given, seeds, views = (
                images[torch.from_numpy(there)],
                given[there],
                seeds[there],
                None if views is None else views[there],
            )
        captions = [self.reader.caption(i) for i in given.tolist()]
        stored = {
            name: embeddings.rows(given, np.zeros_like(given) if views is None else views)
            for name, embeddings in self.stored.items()
        }
        labels, given, seeds = (
            torch.from_numpy(a) for a in (self.dataset.labels[given], given, seeds.view(np.int64).copy())
        )
        return Batch(images, labels, given, seeds, captions, replaced, stored, left_out)

    def _usable(self, asked: int, seed: int, view: int | None) -> tuple[int, np.ndarray | int, str | None]:
        """The sample asked for, or the next usable one of its shard (the first follows the last) or LEFT_OUT, and why another was needed."""
        shard = self.dataset.shard_range(self.dataset.shard_of(asked))
        reason = None
        for step in range(len(shard) if self.replace else 1):
            sample = shard[(asked - shard.start + step) % len(shard)]
            problem = self._problem(sample)
            if problem is None:
                # A view belongs to the sample that is given: it has to look as it did when it was stored.
                look = seed if view is None else int(sample_seeds(self.seed, view, sample)[0])
                try:
                    return sample, self._pixels(sample, decode(self.reader.image(sample)), look), reason
                except DecodeError as error:
                    problem = f"cannot be decoded: {error}"
            reason = reason or problem
        if not self.replace:
            return LEFT_OUT, 0, reason
        raise UserError(
            f"'{self.dataset.name(asked)}': {reason}, nor has its shard any other usable sample; repair or remove the shard"
        )

    def _problem(self, sample: int) -> str | None:
        """What a sample lacks that its training needs; None when it has all."""
        problem = self.dataset.label_problem(sample) if self.need_labels else None
        if problem is None and self.need_captions and not self.reader.caption(sample):
            problem = "no .txt member, or an empty one"
        return problem

    def _pixels(self, sample: int, image, seed: int) -> np.ndarray:
        try:
            return self.transform(image, seed)
        except UserError as error:
            raise UserError(f"'{self.dataset.name(sample)}' {error}") from None
