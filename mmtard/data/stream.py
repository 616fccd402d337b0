"""Batches of decoded samples, read by worker processes.

Which samples a batch holds, and what they look like, is a function of the step alone.
"""

from collections.abc import Iterator, Mapping
from fractions import Fraction

import numpy as np

from ..config import Config, Data
from ..distributed.ranks import Ranks
from ..errors import UserError
from ..seeding import sample_seeds
from .dataset import Dataset
from .images import Transform
from .loader import load_batches
from .order import Order
from .samples import Batch, EmbeddingRows, SampleReader, SampleRequest
from .stager import Stager
from .staging import staging_for


class ReplacedTally:
    """Counts replaced samples and raises UserError when they are more than `share` of max(seen, 1000).

    The floor of 1000 keeps one bad sample among the first few from ending a run; `share` 0 allows none.
    """

    def __init__(self, share: float | Fraction):
        self.share, self.seen, self.count, self.examples = share, 0, 0, []

    def add(self, batch: Batch) -> None:
        """Count a batch's samples. Raises UserError when too many were replaced."""
        self.seen += len(batch)
        self.count += len(batch.replaced)
        self.examples = (self.examples + batch.replaced)[:3]
        if self.count > self.share * max(self.seen, 1000):
            named = "; ".join(f"{asked}: {reason}" for asked, _, reason in self.examples)
            raise UserError(
                f"data.max_replaced: {self.count} of the first {self.seen} samples could not be used, more than the "
                f"share of {float(self.share):g} allows ({named}); repair the shards or raise data.max_replaced"
            )


class TrainStream:
    """This rank's batches for the given steps of a run, each of batch_size / world samples.

    `batch_size` counts the samples of all ranks. Of `settings` (the section `data`) it takes `workers`, `max_replaced`
    and `views`: with `views`, a sample is seen in that many fixed augmentations, in epoch e in number e mod views,
    while its seed is another each epoch. Iterating raises UserError when a shard cannot be read or changed, or when
    more than `max_replaced` of this rank's samples had to be replaced; ProcessLostError when a worker was killed.
    """

    def __init__(
        self,
        samples: SampleReader,
        order: Order,
        settings: Data,
        *,
        batch_size: int,
        steps: range,
        rank: int = 0,
        world: int = 1,
    ):
        self.samples, self.order, self.settings = samples, order, settings
        self.batch_size, self.steps, self.rank, self.world = batch_size, steps, rank, world

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Batch]:
        tally = ReplacedTally(self.settings.max_replaced)
        staging = self.samples.staging
        stager = Stager(staging, self.order, self.rank, self.world) if staging else None
        if stager:
            stager.check(self.steps.start * self.batch_size)
        try:
            for step, batch in enumerate(
                load_batches(self.samples, self._requests(), self.settings.workers, self.batch_size // self.world),
                self.steps.start,
            ):
                if stager:
                    stager.advance((step + 1) * self.batch_size)
                tally.add(batch)
                yield batch
        finally:
            if stager:
                stager.close()

    def _requests(self) -> Iterator[SampleRequest]:
        views = self.settings.views
        for step in self.steps:
            ids, epochs = self.order.rank_batch(step * self.batch_size, self.batch_size, self.rank, self.world)
            yield SampleRequest(ids, sample_seeds(self.samples.seed, epochs, ids), epochs % views if views else None)


def train_stream(
    config: Config,
    dataset: Dataset,
    ranks: Ranks,
    image_size: int,
    *,
    start: int = 0,
    stop: int | None = None,
    embeddings: Mapping[str, EmbeddingRows] | None = None,
) -> TrainStream:
    """The batches of a run's configuration for this rank, from step `start` to `stop` (None: the run's last)."""
    data = config.data
    samples = SampleReader(
        dataset,
        Transform(image_size, data.resize, data.crop_scale, data.flip),
        seed=config.seed,
        need_labels=config.needs_labels,
        need_captions=data.targets == "captions",
        staging=staging_for(dataset, data.cache),
        embeddings=embeddings,
    )
    return TrainStream(
        samples,
        Order(dataset.shard_counts, config.seed, data.lanes, data.window),
        data,
        batch_size=config.train.batch_size,
        steps=range(start, config.train.steps if stop is None else stop),
        rank=ranks.rank,
        world=ranks.world_size,
    )


def eval_batches(
    samples: SampleReader,
    sample_ids,
    batch_size: int,
    *,
    views: np.ndarray | None = None,
    workers: int = 0,
    max_replaced: float | Fraction = 0.01,
) -> Iterator[Batch]:
    """The given samples in the given order, `batch_size` at a time, the last batch with what is left.

    `views`, int64 as `sample_ids`: which of its fixed views each is given in; None: in the view of the reader's seed.
    A reader that does not replace leaves out of a batch, which may become empty, the samples that cannot be used;
    how many may be is up to the caller. Raises as TrainStream does.
    """
    ids = np.asarray(sample_ids, dtype=np.int64)
    chunks = (slice(i, i + batch_size) for i in range(0, len(ids), batch_size))
    requests = (
        SampleRequest(
            ids[c], sample_seeds(samples.seed, np.zeros_like(ids[c]), ids[c]), None if views is None else views[c]
        )
        for c in chunks
    )
    tally = ReplacedTally(max_replaced)
    for batch in load_batches(samples, requests, workers, min(batch_size, len(ids))):
        tally.add(batch)
        yield batch
