"""Batches of decoded samples, read by worker processes; which samples, and what they look like, is a function of the step alone."""

import atexit
import multiprocessing
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction

import numpy as np
import torch
from torch.utils.data import DataLoader

from ..errors import ProcessLostError, UserError
from ..seeding import sample_seeds
from .dataset import Dataset
from .images import Native, Transform
from .order import Order
from .samples import Batch, EmbeddingRows, SampleReader, SampleRequest
from .staging import SHIELDED, Stager, Staging


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


class TrainStream:
    """This rank's batches for steps start..stop-1 of a run.

    `batch_size` is global, the batches have batch_size/world samples. `seed` decides each sample's own randomness. With `views`, a
    sample is seen in that many fixed augmentations, in epoch e in number e mod views, while its seed is another each epoch.
    `stored`: teacher -> embeddings that the batches bring along. Iterating raises UserError when a shard cannot be read or changed,
    or when more than `max_replaced` of this rank's samples had to be replaced.
    """

    def __init__(
        self, dataset: Dataset, order: Order, transform: Transform, *, seed: int, batch_size: int, rank: int = 0, world: int = 1,
        start: int = 0, stop: int, workers: int = 0, need_labels: bool = True, max_replaced: float | Fraction = 0.01, staging: Staging | None = None,
        need_captions: bool = False, views: int | None = None, stored: Mapping[str, EmbeddingRows] | None = None,
    ):  # fmt: skip
        self.order, self.seed, self.batch_size, self.rank, self.world = order, seed, batch_size, rank, world
        self.start, self.stop, self.workers = start, stop, workers
        self.samples, self.views = (
            SampleReader(dataset, transform, need_labels, staging, need_captions, seed=seed, stored=stored),
            views,
        )
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

    def _requests(self) -> Iterator[SampleRequest]:
        for step in range(self.start, self.stop):
            ids, epochs = self.order.rank_batch(step * self.batch_size, self.batch_size, self.rank, self.world)
            yield SampleRequest(ids, sample_seeds(self.seed, epochs, ids), epochs % self.views if self.views else None)


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
    requests = (
        SampleRequest(ids[c], sample_seeds(seed, np.zeros_like(ids[c]), ids[c]), None if views is None else views[c])
        for c in chunks
    )
    tally = ReplacedTally(max_replaced)
    for batch in _load(
        SampleReader(dataset, transform, need_labels, staging, seed=seed, replace=replace), requests, workers
    ):
        tally.add(batch)
        yield batch


def _load(samples: SampleReader, requests: Iterator, workers: int) -> Iterator[Batch]:
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
        raise ProcessLostError(
            f"a loader process was lost: {' '.join(str(error).split())}; if its memory ran out, lower data.workers (now {workers})"
        ) from None
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
