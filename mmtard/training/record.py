"""What a step is recorded as: numbers that all ranks agree on, replaced samples, skipped steps."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..data.dataset import Dataset
from ..data.samples import Batch
from ..distillation.accuracy import accuracies
from ..distributed.ranks import Ranks
from ..errors import RunError
from ..runs.metrics import SilentLogger
from .engine import UpdateResult
from .step import StepOutcome
from .step_terms import BAD, GRAD_NORM


@dataclass(frozen=True)
class Agreed:
    """The numbers of a step over its global batch, the same on every rank."""

    means: dict[str, float]  # of the loss, its terms, and the student's hits
    quantiles: dict[str, float]  # of the teachers' weights
    update: UpdateResult  # its norm read
    digest: int  # which samples of which epoch these were
    replaced_now: int  # samples of this batch that could not be used
    bad: int  # samples of this batch without a finite loss
    stop: bool  # whether any rank was asked to stop
    skipped: int  # steps of the run so far that were not applied
    replaced: int  # samples of the run so far that took another's place


class StepRecord:
    """The counts of a run so far, and what of a step is out of the ordinary.

    state: that of the checkpoint the run goes on from. Its methods are collective, and decide the same on every rank.
    """

    def __init__(self, dataset: Dataset, ranks: Ranks, logger: SilentLogger, batch_size: int, state: dict):
        self.dataset, self.ranks, self.logger, self.batch_size = dataset, ranks, logger, batch_size
        self.bad_in_a_row: int = state.get("bad_in_a_row", 0)
        self.skipped: int = state.get("skipped", 0)
        self.replaced: int = state.get("replaced", 0)

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps of it."""
        return {"bad_in_a_row": self.bad_in_a_row, "skipped": self.skipped, "replaced": self.replaced}

    def agree(self, done: StepOutcome, batch: Batch, stop: bool) -> Agreed:
        """Sum a step's numbers over the ranks, in one collective, and count it.

        The host waits for the device once: nothing of the step was read before but whether it was applied.
        """
        counts = [batch_digest(batch.seeds), len(batch.replaced), stop]
        total, update = done.terms.total(counts, self.ranks), done.update
        digest, replaced, stop_asked = total.counts
        bad = total.sums.pop(BAD)
        means = accuracies({name: sum_ / self.batch_size for name, sum_ in total.sums.items()})
        update = UpdateResult(update.applied, total.alike.get(GRAD_NORM, update.grad_norm))
        self.replaced += int(replaced)
        self.skipped += not update.applied
        self.bad_in_a_row = 0 if update.applied else self.bad_in_a_row + 1
        return Agreed(
            means,
            total.quantiles,
            update,
            int(digest),
            int(replaced),
            int(bad),
            bool(stop_asked),
            self.skipped,
            self.replaced,
        )

    def report(self, step: int, agreed: Agreed, done: StepOutcome, batch: Batch) -> None:
        """Name the samples that were replaced, and those that made a step be skipped, as events."""
        if agreed.replaced_now:
            pairs = [pair for rank in self.ranks.all_gather(batch.replaced) for pair in rank]
            names = [f"{wanted} -> {used} ({reason})" for wanted, used, reason in pairs]
            self.logger.event(step, "replaced", samples=names)
        if not agreed.update.applied:
            self._report_skipped(step, agreed, batch, done.bad_samples(batch))

    def _report_skipped(self, step: int, agreed: Agreed, batch: Batch, bad_samples: list[int]) -> None:
        # All losses are finite but the gradient is not: any sample of the batch may be the cause.
        suspects = bad_samples if agreed.bad else batch.sample_ids.tolist()
        names = self.ranks.all_gather([self.dataset.name(sample) for sample in suspects])
        kind = "non-finite loss, step skipped" if agreed.bad else "non-finite gradient, step skipped"
        ranks = [rank for rank, of_rank in enumerate(names) if of_rank]
        self.logger.event(step, kind, ranks=ranks, samples=[name for of_rank in names for name in of_rank])

    def raise_if_never_finite(self, step: int, max_bad_steps: int) -> None:
        """RunError after so many skipped steps in a row."""
        if self.bad_in_a_row >= max_bad_steps:
            raise RunError(
                f"step {step}: {self.bad_in_a_row} steps in a row were not finite; "
                "lower train.lr or look at events.jsonl for the samples"
            )

    def raise_if_ruined(self, step: int, agreed: Agreed) -> None:
        """RunError where no sample of the step had a finite loss: such weights are neither saved nor called complete.

        They may be finite themselves, and give no finite number for any image.
        """
        if agreed.bad == self.batch_size:
            raise RunError(
                f"step {step}: no sample of the batch has a finite loss, so the weights are not saved; "
                "lower train.lr, then go on from the last checkpoint"
            )


def batch_digest(seeds: Tensor) -> float:
    """A number for which samples of which epoch these are: seeds int64 [b].

    It adds up over ranks, in any order, exactly.
    """
    return float((seeds & 0xFFFFFFFF).sum().item())
