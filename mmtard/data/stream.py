"""Batches of decoded samples, read by worker processes; which samples, and what they look like, is a function of the step alone."""

import atexit
import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..errors import Lost, UserError
from .dataset import Dataset, Reader
from .embeddings import Embeddings
from .images import DecodeError, Native, Transform, decode
from .order import Order, sample_seeds
from .staging import SHIELDED, Stager, Staging

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
    stored: dict[str, Tensor] = field(default_factory=dict)
    left_out: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    def pin_memory(self) -> "Batch":
        tensors = (t.pin_memory() for t in (self.images, self.labels, self.sample_ids, self.seeds))
        return Batch(*tensors, self.captions, self.replaced, {name: z.pin_memory() for name, z in self.stored.items()}, self.left_out)


class Request(NamedTuple):
    """What is asked of a loader: samples int64 [b], their seeds uint64 [b], and which fixed view of each (int64 [b]); None: the
    seeds decide the augmentation, too."""

    ids: np.ndarray
    seeds: np.ndarray
    views: np.ndarray | None


class Samples:
    """Request -> Batch, or the UserError that reading it met: raised in a worker it would become a traceback.

    `seed` decides what the fixed views look like. `replace`: a sample that cannot be used is replaced, else left out.
    """

    def __init__(
        self, dataset: Dataset, transform: Transform | Native, need_labels: bool, staging: Staging | None, need_captions: bool = False, *, seed: int = 0,
        stored: dict[str, Embeddings] | None = None, replace: bool = True,
    ):  # fmt: skip
        self.dataset, self.transform, self.need_labels, self.need_captions = dataset, transform, need_labels, need_captions
        self.seed, self.stored, self.replace = seed, stored or {}, replace
        self.reader = Reader(dataset, staging)

    def __getitem__(self, request: Request) -> Batch | UserError:
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
            images, given, seeds, views = images[torch.from_numpy(there)], given[there], seeds[there], None if views is None else views[there]
        captions = [self.reader.caption(i) for i in given.tolist()]
        stored = {name: embeddings.rows(given, np.zeros_like(given) if views is None else views) for name, embeddings in self.stored.items()}
        labels, given, seeds = (torch.from_numpy(a) for a in (self.dataset.labels[given], given, seeds.view(np.int64).copy()))
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
        raise UserError(f"'{self.dataset.name(asked)}': {reason}, nor has its shard any other usable sample; repair or remove the shard")

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


class ReplacedTally:
    """Counts replaced samples and raises UserError when they are more than `share` of max(seen, 1000).

    The floor of 1000 keeps one bad sample among the first few from ending a run; `share` 0 allows none.
    """

    def __init__(self, share: float | Fraction):
        self.share, self.seen, self.count, self.examples = share, 0, 0, []

    def add(self, batch: Batch) -> None:
        self.seen += len(batch)
        self.count += len(batch.replaced)
        self.examples = (self.examples + batch.replaced)[:3]
        if self.count > self.share * max(self.seen, 1000):
            named = "; ".join(f"{asked}: {reason}" for asked, _, reason in self.examples)
            raise UserError(
                f"data.max_replaced: {self.count} of the first {self.seen} samples could not be used, more than the share of {float(self.share):g} "
                f"allows ({named}); repair the shards or raise data.max_replaced"
            )


class Stream:
    """This rank's batches for steps start..stop-1 of a run.

    `batch_size` is global, the batches have batch_size/world samples. `seed` decides each sample's own randomness. With `views`, a
    sample is seen in that many fixed augmentations, in epoch e in number e mod views, while its seed is another each epoch.
    `stored`: teacher -> embeddings that the batches bring along. Iterating raises UserError when a shard cannot be read or changed,
    or when more than `max_replaced` of this rank's samples had to be replaced.
    """

    def __init__(
        self, dataset: Dataset, order: Order, transform: Transform, *, seed: int, batch_size: int, rank: int = 0, world: int = 1,
        start: int = 0, stop: int, workers: int = 0, need_labels: bool = True, max_replaced: float | Fraction = 0.01, staging: Staging | None = None,
        need_captions: bool = False, views: int | None = None, stored: dict[str, Embeddings] | None = None,
    ):  # fmt: skip
        self.order, self.seed, self.batch_size, self.rank, self.world = order, seed, batch_size, rank, world
        self.start, self.stop, self.workers = start, stop, workers
        self.samples, self.views = Samples(dataset, transform, need_labels, staging, need_captions, seed=seed, stored=stored), views
        self.max_replaced, self.staging = max_replaced, staging if dataset.remote else None

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __iter__(self) -> Iterator[Batch]:
        tally = ReplacedTally(self.max_replaced)
        stager = Stager(self.staging, self.order, self.rank, self.world) if self.staging else None
        if stager:
            stager.check(self.start * self.batch_size)
        try:
            for step, batch in enumerate(_load(self.samples, self._requests(), self.workers), self.start):
                if stager:
                    stager.advance((step + 1) * self.batch_size)
                tally.add(batch)
                yield batch
        finally:
            if stager:
                stager.close()

    def _requests(self) -> Iterator[Request]:
        for step in range(self.start, self.stop):
            ids, epochs = self.order.rank_batch(step * self.batch_size, self.batch_size, self.rank, self.world)
            yield Request(ids, sample_seeds(self.seed, epochs, ids), epochs % self.views if self.views else None)


def eval_batches(
    dataset: Dataset, transform: Transform | Native, sample_ids, batch_size: int, seed: int = 0, workers: int = 0,
    need_labels: bool = True, max_replaced: float | Fraction = 0.01, staging: Staging | None = None, views: np.ndarray | None = None,
    replace: bool = True,
) -> Iterator[Batch]:  # fmt: skip
    """The given samples in the given order, `batch_size` at a time, the last batch with what is left. Raises as Stream does.

    `views` int64 as `sample_ids`: which of its fixed views each is given in; None: in that of `seed`. Without `replace`, samples that
    cannot be used are left out of their batch, which may be empty; how many may be is up to the caller.
    """
    ids = np.asarray(sample_ids, dtype=np.int64)
    chunks = (slice(i, i + batch_size) for i in range(0, len(ids), batch_size))
    requests = (Request(ids[c], sample_seeds(seed, np.zeros_like(ids[c]), ids[c]), None if views is None else views[c]) for c in chunks)
    tally = ReplacedTally(max_replaced)
    for batch in _load(Samples(dataset, transform, need_labels, staging, seed=seed, replace=replace), requests, workers):
        tally.add(batch)
        yield batch


def _load(samples: Samples, requests: Iterator, workers: int) -> Iterator[Batch]:
    loader = DataLoader(
        samples, sampler=requests, batch_size=None, num_workers=workers, collate_fn=_as_it_is, pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker, multiprocessing_context="fork" if workers else None, generator=torch.Generator(),
    )  # fmt: skip
    others = set(multiprocessing.active_children())
    with _signals_held():
        batches = iter(loader)
    processes = [p for p in multiprocessing.active_children() if p not in others]

    def end() -> None:
        if workers:
            batches._shutdown_workers()  # public only as garbage collection, which a kept traceback would put off
        for process in processes:
            if process.is_alive():  # in the middle of a long fetch, it ignores the signal that ends it
                process.kill()

    # Before multiprocessing's own exit, which would wait for workers that ignore its SIGTERM.
    atexit.register(end)
    try:
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise Lost(f"a loader process was lost: {' '.join(str(error).split())}; if its memory ran out, lower data.workers (now {workers})") from None
    finally:
        end()
        atexit.unregister(end)


def _as_it_is(batch):
    return batch


def _start_worker(_: int) -> None:
    for number in SHIELDED:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


@contextmanager
def _signals_held():
    """Keep the shielded signals pending while workers are forked: until they ignore them, one would end them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SHIELDED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
