"""The work of a dataset, cut into chunks of samples that are the same at every world size, shared by the ranks, and
measured in batches as large as the memory allows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice

import numpy as np

from ..attacks.batching import AdaptiveBatchSize
from ..config import Cache
from ..data.dataset import Dataset
from ..data.images import Native, Transform
from ..data.samples import Batch, SampleReader
from ..data.staging import staging_for
from ..data.stream import eval_batches
from ..distributed.interruption import Interruption, StoppedWithin
from ..distributed.ranks import Ranks
from ..errors import RunError, UserError
from .partial_results import PartialResults

# Images a rank takes at once where no number is asked for. Memory that is too small for them halves the number.
CPU_BATCH, CUDA_BATCH = 64, 128
SAY_EVERY_S = 10.0


@dataclass
class ChunkedWork:
    """What one rank needs to go through samples of a dataset."""

    dataset: Dataset
    transform: Transform | Native
    chunk: int  # samples
    seed: int
    workers: int
    cache: Cache
    ranks: Ranks
    in_batches: AdaptiveBatchSize
    interruption: Interruption
    say: Callable
    max_left_out: float | Fraction = 0.01  # share of samples that may be unreadable

    def measure(
        self,
        part: str,
        ids: np.ndarray,
        progress: PartialResults,
        measure: Callable,
        need_labels: bool = True,
        max_left_out: float | Fraction = 0,
    ) -> tuple[list[dict], list[tuple[str, str]]]:
        """Measure what is left of a part. Collective.

        measure(images [b,3,H,W] float32 in [0,1], batch, their ids) -> the row. Returns, on every rank, the rows of the
        chunks in their order, and (name, reason) of each sample that could not be read and is in no row. Raises
        UserError when more than the share `max_left_out` cannot be read; RunError with status REQUEUE on an
        interruption, which a model that is asked through `interruption.heeding` notices within a chunk: all that was
        measured is kept.
        """
        chunks = [ids[i : i + self.chunk] for i in range(0, len(ids), self.chunk)]
        progress.keep_fitting(part, chunks)
        mine, rounds = progress.mine(part, len(chunks))
        my_ids = np.concatenate([chunks[c] for c in mine]) if mine else np.empty(0, dtype=np.int64)
        meter = RateMeter(
            part, sum(len(chunk) for c, chunk in enumerate(chunks) if (part, c) not in progress.done), self
        )
        to_do, failure = zip(mine, self.batches(my_ids, self.chunk, need_labels)), None
        for _ in range(rounds):
            self.agree(progress, failure)
            try:
                for chunk, batch in islice(to_do, 1):
                    read = batch.sample_ids.tolist()
                    row = measure(batch.pixels(self.ranks.device), batch, read) if read else {}
                    progress.add(part, chunk, {"ids": read, "left_out": batch.left_out, **row})
                    meter.add(len(chunks[chunk]))
            except StoppedWithin:
                pass  # The ranks agree on it before the next chunk, or after the last.
            except (UserError, RunError) as error:
                failure = error
        self.agree(progress, failure)
        rows = progress.rows(part)
        left_out = [tuple(named) for row in rows for named in row["left_out"]]
        check_left_out(part, left_out, len(ids), max_left_out)
        return [row for row in rows if row["ids"]], left_out

    def agree(self, progress: PartialResults, failure: UserError | RunError | None = None) -> None:
        """End on every rank with what one of them met, or when one was interrupted. Collective."""
        self.ranks.raise_together(failure)
        self.interruption.stop(self.ranks, kept=f"what is measured is kept in '{progress.folder.parent}'")

    def batches(self, ids: np.ndarray, size: int, need_labels: bool = True) -> Iterator[Batch]:
        """The samples in this order, `size` at a time."""
        samples = SampleReader(
            self.dataset,
            self.transform,
            seed=self.seed,
            need_labels=need_labels,
            staging=staging_for(self.dataset, self.cache),
            replace=False,
        )
        return eval_batches(samples, ids, size, workers=self.workers)


def check_left_out(where: str, left_out: Sequence[tuple[str, str]], n: int, most: float | Fraction) -> None:
    """Raises UserError when more than the share `most` of n samples, or all of them, could not be read."""
    if left_out and (len(left_out) > most * n or len(left_out) == n):
        message = (
            f"{len(left_out)} of {n} samples cannot be read, "
            f"and {float(100 * most):g} % may be left out ({named(left_out)})"
        )
        raise UserError(f"{where}: {message}; repair or remove them")


def named(left_out: Sequence[tuple[str, str]]) -> str:
    """The first few of the samples, each with what is wrong with it."""
    return "; ".join(f"{name}: {reason}" for name, reason in left_out[:3]) + ("; ..." if len(left_out) > 3 else "")


class RateMeter:
    """Says now and then how fast the samples of a part are measured over all ranks, and how long the rest takes."""

    def __init__(self, part: str, total: int, work: ChunkedWork):
        self.part, self.total, self.work = part, total, work
        self.done, self.began = 0, time.monotonic()
        self.said = self.began

    def add(self, n: int) -> None:
        """Count n more samples of this rank; the other ranks are taken to be as fast."""
        self.done += n * self.work.ranks.world_size
        now = time.monotonic()
        if self.work.ranks.is_first and now - self.said > SAY_EVERY_S:
            self.said, done = now, min(self.done, self.total)
            rate = done / (now - self.began)
            self.work.say(
                f"{self.part}: {done}/{self.total} samples  {rate:.3g} images/s  "
                f"left {(self.total - done) / rate:.0f} s"
            )
