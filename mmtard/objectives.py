"""What an attack maximises, by name: per-sample losses of the student's Prediction on the perturbed image.

`mmtard.config.ATTACK_OBJECTIVES` names them with the teacher each is measured against.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .attacks import derive_seeds, sample_uniform
from .errors import unknown
from .losses import cross_entropy, kl, kl_of_mean, squared_distance
from .methods import Pass, Prediction

AttackLoss = Callable[..., Tensor]  # (the student's Prediction on x+d[, the moving teacher's]) -> [B]
TARGET_DRAW = 2**20  # a seed of its own, beyond those of the restarts


class Objective(NamedTuple):
    """An attack objective by name, and whose predictions it needs.

    `targets` are asked once, on the clean images; `moving` is a teacher that is asked on the perturbed image at every step, and
    through which the gradient flows. `fusion`: the weights of `kl_fused`, of sum 1.
    """

    name: str
    targets: frozenset[Pass] = frozenset()
    moving: str | None = None
    fusion: dict[str, float] = {}


TARGETS = {
    "ce": None, "ce_targeted": None, "kl_clean": "clean", "kl_robust": "robust", "kl_fused": None, "kl_self": "student", "kl_adaptive": None,
    "l2_embedding": "start",
}  # fmt: skip
MOVING = {"kl_adaptive": "robust"}


def find(name: str, fusion: dict[str, float] | None = None) -> Objective:
    """The objective called `name`; UserError lists the known ones."""
    if name not in TARGETS:
        raise unknown("attack objective", name, TARGETS)
    fusion = fusion or {}
    models = fusion if name == "kl_fused" else [TARGETS[name]] if TARGETS[name] else []
    return Objective(name, frozenset(Pass(m, "clean") for m in models), MOVING.get(name), fusion)


def attack_loss(objective: Objective, targets: dict[Pass, Prediction], labels: Tensor, seeds: Tensor) -> AttackLoss:
    """The per-sample loss [B] that the attack maximises; `targets` hold the objective's predictions on x.

    `ce`: CE(p_S(x+d), y). `ce_targeted`: -CE(p_S(x+d), t), t a wrong class drawn from the sample's seed. `kl_clean`, `kl_robust`,
    `kl_self`: KL(p_M(x) || p_S(x+d)) with M the clean teacher, the robust teacher, or the student itself (TRADES). `kl_fused`:
    KL(sum_m f_m p_m(x) || p_S(x+d)). `kl_adaptive`: KL(p_Tr(x+d) || p_S(x+d)), both moving (AdaAD). `l2_embedding`:
    ||z_S(x+d) - z_T0(x)||^2, not normalised (FARE, Sim-CLIP).
    """
    name = objective.name
    fixed = {p.model: Prediction(*(t if t is None else t.detach() for t in prediction)) for p, prediction in targets.items()}
    if name == "ce":
        return lambda student: cross_entropy(student.logits, labels)
    if name == "ce_targeted":
        return lambda student: -cross_entropy(student.logits, wrong_class(labels, seeds, student.logits.shape[-1]))
    if name == "kl_adaptive":
        return lambda student, teacher: kl(teacher.logits, student.logits)
    if name == "kl_fused":
        weights = list(objective.fusion.values())
        logits = [fixed[m].logits for m in objective.fusion]
        return lambda student: kl_of_mean(logits, weights, student.logits)
    (target,) = fixed.values()
    if name == "l2_embedding":
        return lambda student: squared_distance(student.embeddings, target.embeddings)
    return lambda student: kl(target.logits, student.logits)


def wrong_class(labels: Tensor, seeds: Tensor, classes: int) -> Tensor:
    """A class other than the label's, uniform over the others, from each sample's own seed: labels, seeds int64 [B] -> int64 [B]."""
    offset = (sample_uniform(derive_seeds(seeds, TARGET_DRAW), (1,)).squeeze(1).double() * (classes - 1)).long()
    return torch.remainder(labels + 1 + offset, classes)
