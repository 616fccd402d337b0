"""The alarm for catastrophic overfitting: a student robust to the one-step attack it trains on, and to nothing else.

Wong et al., "Fast is better than free", ICLR 2020, found it, and that it comes within a few hundred steps;
Andriushchenko & Flammarion, NeurIPS 2020, explain it. Li et al., "Towards Understanding Fast Adversarial Training",
2020, found that a few steps of PGD mend it: from the alarm on the attack has `attack.alarm_steps` steps. The thresholds
are ours.
"""

from __future__ import annotations

from torch import Tensor

from ..config import Attack, Config
from ..config.attack import matched_step
from ..data.samples import Batch
from ..distillation.task import DistillationTask
from ..distillation.training_attack import perturb
from ..distributed.ranks import Ranks
from ..evaluation.statistics import wilson_interval
from ..losses import cross_entropy, top1
from ..runs.layout import OVERFITTED
from ..runs.metrics import SilentLogger

REMEDY = "raise attack.steps, or lower attack.step_size or attack.eps; earlier checkpoints may be more robust"
STEPS = 10


class OverfittingAlarm:
    """Compares the training's one-step attack with a multi-step one, on one micro-batch of each rank.

    Every `attack.alarm_every` steps, as long as the attack has one step.
    """

    def __init__(
        self, config: Config, task: DistillationTask, ranks: Ranks, micro_batch_size: int, logger: SilentLogger
    ):
        tells = config.attack_objective is not None and config.data.targets != "none"
        self.every = config.attack.alarm_every if tells else None
        self.ratio, self.alarm_steps = config.attack.alarm_ratio, config.attack.alarm_steps
        self.task, self.ranks, self.size, self.logger = task, ranks, micro_batch_size, logger

    def after_step(self, step: int, batch: Batch) -> dict | None:
        """Report the alarm as an event where it goes off after `step`, and let the task fall back to more steps.

        Returns what it reported, the same on every rank; None when it does not go off, or is not due.
        Collective. The student is in evaluation mode, and neither it nor any random state changes.
        """
        if self.every is None or step % self.every or self.task.attack.steps > 1:
            return None
        micro = next(iter(batch.split(self.size))).to(self.ranks.device)
        known = micro.labels >= 0  # data for a method that reads no labels may lack them
        images = micro.pixels(self.ranks.device)
        hits = self._hits(images, micro.labels.clamp_min(0), micro.seeds, micro.teacher_embeddings)
        single, multi, n = (
            int(total) for total in self.ranks.sum([int((h & known).sum()) for h in hits] + [int(known.sum())])
        )
        if not overfitted(single, multi, n, self.ratio):
            return None
        report = {"one_step_accuracy": single / n, f"pgd{STEPS}_accuracy": multi / n, "samples": n}
        if self.alarm_steps is None:
            report["remedy"] = REMEDY
        else:
            report["attack_steps_from_now_on"] = self.alarm_steps
            self.task.fell_back = True
        self.logger.event(step, OVERFITTED, **report)
        return report

    def _hits(self, images: Tensor, labels: Tensor, seeds: Tensor, stored: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Whether the student gets each sample right under the training's attack, and under PGD on cross-entropy."""
        single = self.task.adversarial(images, labels, seeds, stored)
        with self.task.student.attack_forward() as forward:

            def predict(x: Tensor) -> Tensor:
                return self.task.head(forward(x)).logits

            multi = perturb(multi_step(self.task.attack), lambda x: cross_entropy(predict(x), labels), images, seeds)
            return tuple(top1(predict(x).detach(), labels) for x in (single, multi))


def multi_step(attack: Attack) -> Attack:
    """PGD in the ball of the training's attack, with steps of 2.5 eps / STEPS from a random start."""
    return attack.model_copy(
        update={
            "algorithm": "pgd",
            "steps": STEPS,
            "step_size": matched_step(attack.eps, STEPS),
            "momentum": 0.0,
            "random_start": True,
            "restarts": 1,
        }
    )


def overfitted(single: int, multi: int, n: int, ratio: float) -> bool:
    """Whether `multi` right of n is below `ratio` times `single` right of n, and their 95 % intervals are apart."""
    return multi < ratio * single and wilson_interval(multi, n)[1] < wilson_interval(single, n)[0]
