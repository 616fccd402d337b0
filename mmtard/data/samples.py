"""Samples as tensors: what a loader worker reads, decodes and gives back as a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..seeding import sample_seeds
from .dataset import NO_LABEL, Dataset
from .images import DecodeError, Native, Transform, decode
from .reader import Reader
from .staging import Staging

LEFT_OUT = -1
NO_CAPTION = "no .txt member, or an empty one"


@dataclass
class Batch:
    """b samples of a data set.

    `images` uint8 [b,3,H,W]; `labels`, `sample_ids`, `seeds` int64 [b]; `captions` str [b], empty where there is none.
    `sample_ids` name the samples whose images these are; `seeds` are uint64 bit patterns. `replaced` has (asked name,
    given name, reason) for each sample that could not be used; `left_out` has (name, reason) of those that no other
    replaced. `teacher_embeddings`: teacher -> its embeddings [b,D] float32 of these very images.
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

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, from which `to` copies while the accelerator computes."""
        return self._with_tensors(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its images, labels, seeds and embeddings on `device`.

        `sample_ids` stay on the CPU: they name samples in logs and files.
        """
        moved = self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))
        return replace(moved, sample_ids=self.sample_ids)

    def pixels(self, device: torch.device | str) -> Tensor:
        """The images as float32 [b,3,H,W] in [0, 1] on `device`."""
        return self.images.to(device, non_blocking=True).float() / 255

    def split(self, size: int) -> Iterator[Batch]:
        """Micro-batches of `size` samples in order, the last with what is left. Views: nothing is copied.

        What was replaced or left out belongs to the whole batch; the micro-batches do not repeat it.
        """
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            micro = self._with_tensors(lambda tensor, part=part: tensor[part])
            yield replace(micro, captions=self.captions[part], replaced=[], left_out=[])

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            images=change(self.images),
            labels=change(self.labels),
            sample_ids=change(self.sample_ids),
            seeds=change(self.seeds),
            teacher_embeddings={name: change(rows) for name, rows in self.teacher_embeddings.items()},
        )


class EmbeddingRows(Protocol):
    """Stored embeddings of one teacher, as `mmtard.embeddings` keeps them."""

    def rows(self, samples: np.ndarray, views: np.ndarray) -> Tensor:
        """The embeddings [b,D] float32 of samples int64 [b], each in its fixed view int64 [b]."""


class SampleRequest(NamedTuple):
    """What is asked of a loader: samples int64 [b], their seeds uint64 [b], and which fixed view of each, int64 [b].

    Without `views` (None) the seeds decide the augmentation, too.
    """

    ids: np.ndarray
    seeds: np.ndarray
    views: np.ndarray | None


class SampleReader:
    """Reads what a SampleRequest names: SampleRequest -> Batch.

    A UserError met while reading is returned, not raised: raised in a worker it would become a traceback.
    `seed` decides what the fixed views look like. `embeddings`: teacher -> rows that the batches bring along.
    `replace`: a sample that cannot be used is replaced by the next of its shard, else it is left out.
    """

    def __init__(
        self,
        dataset: Dataset,
        transform: Transform | Native,
        *,
        seed: int = 0,
        need_labels: bool = True,
        need_captions: bool = False,
        staging: Staging | None = None,
        embeddings: Mapping[str, EmbeddingRows] | None = None,
        replace: bool = True,
    ):
        self.dataset, self.transform, self.seed = dataset, transform, seed
        self.need_labels, self.need_captions = need_labels, need_captions
        self.staging, self.embeddings, self.replace = staging, embeddings or {}, replace
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
            images, given, seeds = images[torch.from_numpy(there)], given[there], seeds[there]
            views = None if views is None else views[there]
        embeddings = {
            name: rows.rows(given, np.zeros_like(given) if views is None else views)
            for name, rows in self.embeddings.items()
        }
        return Batch(
            images=images,
            labels=torch.from_numpy(self.dataset.labels[given]),
            sample_ids=torch.from_numpy(given),
            seeds=torch.from_numpy(seeds.view(np.int64).copy()),
            captions=[self._caption(i, seed) for i, seed in zip(given.tolist(), seeds.tolist())],
            replaced=replaced,
            teacher_embeddings=embeddings,
            left_out=left_out,
        )

    def _usable(self, asked: int, seed: int, view: int | None) -> tuple[int, np.ndarray | int, str | None]:
        """(sample, its pixels, why it is not the one asked for): the next usable sample of the shard, or LEFT_OUT.

        The first sample of a shard follows its last.
        """
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
        setting = {NO_CAPTION: "data.caption_key", NO_LABEL: "data.label_key"}.get(reason)
        where = f", or name the key of .json members that holds it ({setting})" if setting else ""
        raise UserError(
            f"'{self.dataset.name(asked)}': {reason}, nor has its shard any other usable sample; "
            f"repair or remove the shard{where}"
        )

    def _caption(self, sample: int, seed: int) -> str:
        """One of the sample's captions, which its seed chooses where there are several; empty where there is none."""
        captions = self.reader.captions(sample)
        return captions[seed % len(captions)] if captions else ""

    def _problem(self, sample: int) -> str | None:
        """What a sample lacks that its training needs; None when it has all."""
        problem = self.dataset.label_problem(sample) if self.need_labels else None
        if problem is None and self.need_captions and not self.reader.captions(sample):
            key = self.dataset.index.read_by.caption
            problem = NO_CAPTION if key is None else f"no '{key}' in a .json member"
        return problem

    def _pixels(self, sample: int, image, seed: int) -> np.ndarray:
        try:
            return self.transform(image, seed)
        except UserError as error:
            raise UserError(f"'{self.dataset.name(sample)}' {error}") from None
