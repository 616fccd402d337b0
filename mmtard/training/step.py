"""One optimisation step on a rank's share of the global batch: attack, forward, backward, update."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.samples import Batch
from ..distillation.task import DistillationTask
from .engine import Engine, UpdateResult
from .step_terms import BAD, GRAD_NORM, TermSums


@dataclass(frozen=True)
class StepOutcome:
    """What a step left on this rank, most of it still on the device."""

    terms: TermSums
    update: UpdateResult
    finite: Tensor  # bool [b], on the device: whether a sample's loss was

    def bad_samples(self, batch: Batch) -> list[int]:
        """The samples whose loss was not finite; `terms` has their number. The host waits for the device."""
        return batch.sample_ids[~self.finite.cpu()].tolist()


def optimizer_step(
    task: DistillationTask, engine: Engine, batch: Batch, lr: float, device: torch.device
) -> StepOutcome:
    """Train on a batch, one micro-batch at a time; the update is the last one's."""
    terms, finite, update = TermSums(), [], None
    for micro in batch.split(engine.micro_batch_size):
        micro = micro.to(device)
        images = micro.pixels(device)
        loss, named_terms = task(images, micro.labels, micro.seeds, micro.teacher_embeddings, micro.sample_ids)
        finite.append(torch.isfinite(loss.detach()))
        # One non-finite sample makes the gradient non-finite on every rank, and the engine skips the update.
        engine.backward(loss.mean() * torch.where(finite[-1].all(), 1.0, torch.nan))
        update = engine.end_micro_batch(lr)
        terms.add({"loss": loss.detach(), **named_terms})
        terms.count(BAD, ~finite[-1])
    if isinstance(update.grad_norm, Tensor):
        terms.alike[GRAD_NORM] = update.grad_norm
    return StepOutcome(terms, update, torch.cat(finite))
