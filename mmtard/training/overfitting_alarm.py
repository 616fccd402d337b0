"""The alarm for catastrophic overfitting: a student robust to the one-step attack it trains on, and to nothing else.

Wong et al., "Fast is better than free", ICLR 2020, found it, and that it comes within a few hundred steps; Andriushchenko & Flammarion,
NeurIPS 2020, explain it. The thresholds are ours.
"""

from __future__ import annotations

from torch import Tensor

from ..config import Attack, Config
from ..data.samples import Batch
from ..distillation.task import DistillationTask
from ..distillation.training_attack import perturb
from ..distributed.ranks import Ranks
from ..evaluation.statistics import wilson_interval
from ..losses import cross_entropy, top1

EVENT, REMEDY = (
    "alarm: catastrophic overfitting",
    "raise attack.steps, or lower attack.step_size or attack.eps; earlier checkpoints may be more robust",
)
STEPS = 10


class OverfittingAlarm:
    """Compares, every `attack.alarm_every` steps of a training with `attack.steps: 1`, two attacks on one micro-batch of each rank."""

    def __init__(self, config: Config, distillation: DistillationTask, ranks: Ranks, micro_batch_size: int):
        single_step = config.attack_objective is not None and config.attack.steps == 1 and config.data.targets != "none"
        self.every = config.attack.alarm_every if single_step else None
        self.ratio, self.multi_step = config.attack.alarm_ratio, multi_step(config.attack)
        self.distillation, self.ranks, self.size = distillation, ranks, micro_batch_size

    def __call__(self, step: int, batch: Batch) -> dict | None:
        """What to report when the alarm goes off after `step`, the same on every rank; None when it does not or none is due.

        Collective. The student is in evaluation mode, and neither it nor any random state changes.
        """
        if self.every is None or step % self.every:
            return None
        images = batch.images[: self.size].to(self.ranks.device).float() / 255
        labels, seeds = (x[: self.size].to(self.ranks.device) for x in (batch.labels, batch.seeds))
        known = labels >= 0  # data for a method that reads none may lack them
        stored = {name: z[: self.size].to(self.ranks.device) for name, z in batch.teacher_embeddings.items()}
        hits = self._hits(images, labels.clamp_min(0), seeds, stored)
        single, multi, n = (
            int(total) for total in self.ranks.sum([int((h & known).sum()) for h in hits] + [int(known.sum())])
        )
        if not overfitted(single, multi, n, self.ratio):
            return None
        return {"one_step_accuracy": single / n, f"pgd{STEPS}_accuracy": multi / n, "samples": n, "remedy": REMEDY}

    def _hits(self, images: Tensor, labels: Tensor, seeds: Tensor, stored: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Whether the student gets each sample right under the training's attack, and under PGD on cross-entropy."""
        single = self.distillation.adversarial(images, labels, seeds, stored)
        with self.distillation.student.attack_forward() as forward:

            def predict(x: Tensor) -> Tensor:
                return self.distillation.head(forward(x)).logits

            multi = perturb(self.multi_step, lambda x: cross_entropy(predict(x), labels), images, seeds)
            return tuple(top1(predict(x).detach(), labels) for x in (single, multi))


def multi_step(attack: Attack) -> Attack:
    """PGD in the ball of the training's attack, with steps of 2.5 eps / STEPS from a random start."""
    return attack.model_copy(
        update={
            "algorithm": "pgd",
            "steps": STEPS,
            "step_size": attack.eps * 5 / (2 * STEPS),
            "momentum": 0.0,
            "random_start": True,
            "restarts": 1,
        }
    )


def overfitted(single: int, multi: int, n: int, ratio: float) -> bool:
    """Whether `multi` right of n is below `ratio` times `single` right of n, and their 95 % intervals are apart."""
    return multi < ratio * single and wilson_interval(multi, n)[1] < wilson_interval(single, n)[0]
