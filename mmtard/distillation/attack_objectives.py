"""What the attack inside training maximises: per-sample losses of the student's prediction on the perturbed image.

One function an objective, in `LOSSES`; `mmtard.config.ATTACK_OBJECTIVES` says whose predictions each needs.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, remainder

from ..config import ATTACK_OBJECTIVES
from ..errors import unknown_name
from ..losses import cross_entropy, kl, kl_of_mean, squared_distance
from ..seeding import derive_seeds, sample_uniform
from ..zero_shot import Prediction
from .methods import Pass

AttackLoss = Callable[..., Tensor]  # (the student's Prediction on x+d[, the teacher's on x+d]) -> [B]
TARGET_DRAW = 2**20  # derives the seed of a target class: beyond the numbers of all restarts


class Objective(NamedTuple):
    """An attack objective by name, and whose predictions it needs."""

    name: str
    reference_passes: frozenset[Pass] = frozenset()  # predictions on the clean images, once per batch
    through_teacher: str | None = None  # asked on the perturbed images at every attack step, with gradient
    fusion: dict[str, float] = {}  # the weights of `kl_fused`, of sum 1
    sharpness: tuple[float, float] = (1.0, 1.0)  # factors of the reference's and the student's logits (`kl_start`)


class References(NamedTuple):
    """What an objective's loss is measured against: labels, seeds int64 [B]; predictions on x, by model, without
    gradient.
    """

    labels: Tensor
    seeds: Tensor
    predictions: dict[str, Prediction]
    fusion: dict[str, float]
    sharpness: tuple[float, float] = (1.0, 1.0)

    @property
    def only(self) -> Prediction:
        """The one prediction of an objective that has one reference."""
        (prediction,) = self.predictions.values()
        return prediction


def ce(references: References, student: Prediction) -> Tensor:
    """CE(p_S(x+d), y)."""
    return cross_entropy(student.logits, references.labels)


def ce_targeted(references: References, student: Prediction) -> Tensor:
    """-CE(p_S(x+d), t), t a wrong class drawn from the sample's seed."""
    return -cross_entropy(student.logits, wrong_class(references.labels, references.seeds, student.logits.shape[-1]))


def kl_reference(references: References, student: Prediction) -> Tensor:
    """KL(p_M(x) || p_S(x+d)), M the clean teacher, the robust teacher, or the student itself (TRADES)."""
    return kl(references.only.logits, student.logits)


def kl_start(references: References, student: Prediction) -> Tensor:
    """KL(p_T0(x) || p_S(x+d)), the logits times the method's factors (AGFT)."""
    of_reference, of_student = references.sharpness
    return kl(of_reference * references.only.logits, of_student * student.logits)


def kl_fused(references: References, student: Prediction) -> Tensor:
    """KL(sum_m f_m p_m(x) || p_S(x+d))."""
    logits = [references.predictions[name].logits for name in references.fusion]
    return kl_of_mean(logits, list(references.fusion.values()), student.logits)


def kl_adaptive(references: References, student: Prediction, teacher: Prediction) -> Tensor:
    """KL(p_Tr(x+d) || p_S(x+d)), both moving (AdaAD)."""
    return kl(teacher.logits, student.logits)


def l2_embedding(references: References, student: Prediction) -> Tensor:
    """||z_S(x+d) - z_T0(x)||^2, not normalised (FARE, Sim-CLIP)."""
    return squared_distance(student.embeddings, references.only.embeddings)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "ce": ce,
    "ce_targeted": ce_targeted,
    "kl_clean": kl_reference,
    "kl_robust": kl_reference,
    "kl_fused": kl_fused,
    "kl_start": kl_start,
    "kl_self": kl_reference,
    "kl_adaptive": kl_adaptive,
    "l2_embedding": l2_embedding,
}


def find_objective(
    name: str, fusion: dict[str, float] | None = None, sharpness: tuple[float, float] = (1.0, 1.0)
) -> Objective:
    """The objective called `name`; UserError lists the known ones."""
    if name not in ATTACK_OBJECTIVES:
        raise unknown_name("attack objective", name, ATTACK_OBJECTIVES)
    needs, fusion = ATTACK_OBJECTIVES[name], fusion or {}
    models = list(fusion) if name == "kl_fused" else [needs.reference] if needs.reference else []
    return Objective(
        name, frozenset(Pass(model, "clean") for model in models), needs.through_teacher, fusion, sharpness
    )


def attack_loss(objective: Objective, references: dict[Pass, Prediction], labels: Tensor, seeds: Tensor) -> AttackLoss:
    """The per-sample loss [B] that the attack maximises; `references` hold the objective's predictions on x."""
    fixed = {
        p.model: Prediction(*(t if t is None else t.detach() for t in prediction))
        for p, prediction in references.items()
    }
    against = References(labels, seeds, fixed, objective.fusion, objective.sharpness)
    loss = LOSSES[objective.name]
    return lambda *moving: loss(against, *moving)


def wrong_class(labels: Tensor, seeds: Tensor, classes: int) -> Tensor:
    """A class other than the label's, uniform over the others, from each sample's own seed: labels, seeds int64 [B]
    -> int64 [B].
    """
    offset = (sample_uniform(derive_seeds(seeds, TARGET_DRAW), (1,)).squeeze(1).double() * (classes - 1)).long()
    return remainder(labels + 1 + offset, classes)
