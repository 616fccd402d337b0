"""Settings of the attack inside training, and the objectives that it may maximise."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, model_validator

from .methods import START
from .values import Int, Number, Pixels, Section, check_unit


class AttackObjective(NamedTuple):
    """What an attack objective needs.

    reference: the model whose prediction on the clean image it is measured against ("student": the student itself).
    through_teacher: the teacher that is asked on the perturbed image at every step, with gradient.
    labels, classes: whether it reads the samples' labels, and predictions of classes at all.
    """

    reference: str | None = None
    through_teacher: str | None = None
    labels: bool = False
    classes: bool = True

    @property
    def teacher(self) -> str | None:
        """The teacher that the configuration must have for it."""
        return self.through_teacher or (None if self.reference == "student" else self.reference)


# The loss that each maximises is the function of that name in `mmtard/distillation/attack_objectives.py`.
ATTACK_OBJECTIVES: dict[str, AttackObjective] = {
    "ce": AttackObjective(labels=True),
    "ce_targeted": AttackObjective(labels=True),
    "kl_clean": AttackObjective(reference="clean"),
    "kl_robust": AttackObjective(reference="robust"),
    "kl_fused": AttackObjective(),  # every teacher with a weight in attack.fusion
    "kl_self": AttackObjective(reference="student"),
    "kl_adaptive": AttackObjective(through_teacher="robust"),
    "l2_embedding": AttackObjective(reference=START, classes=False),
}


class Attack(Section):
    """The attack that makes the adversarial images of the training."""

    algorithm: Literal["pgd", "apgd"] = Field("pgd", description="projected gradient ascent, or Auto-PGD")
    objective: str | None = Field(None, description="the loss to maximise; null: the method's own")
    fusion: dict[str, Annotated[Number, Field(gt=0)]] | None = Field(
        None, min_length=1, description="kl_fused: relative weight of each teacher; null: all listed teachers alike"
    )
    norm: Literal["linf", "l2"] = Field("linf", description="of the perturbation; l2 is over all pixels of an image")
    eps: Pixels = Field(Fraction(2, 255), ge=0, description="largest perturbation, in units of [0,1]")
    step_size: Pixels = Field(Fraction(1, 255), gt=0, description="pgd's step; apgd sets its own")
    steps: Int = Field(10, ge=1, description="gradient steps of each attack")
    restarts: Int = Field(
        1, ge=1, description="attacks from so many random starts, of which each sample keeps the worst"
    )
    momentum: Number = Field(0.0, ge=0, lt=1, description="pgd: momentum of the normalised gradient")
    random_start: bool = Field(True, description="start anywhere in the ball; false: at the image itself")
    alarm_every: Int | None = Field(
        100, ge=1, description="steps: 1 alone: how often its student is tried with 10 steps; null: never"
    )
    alarm_ratio: Number = Field(
        0.25, gt=0, le=1, description="of the one-step accuracy; a multi-step accuracy below it sets off the alarm"
    )

    @model_validator(mode="after")
    def _within_pixels(self):
        for name in ("eps", "step_size"):
            if self.norm == "linf":
                check_unit(f"attack.{name}", getattr(self, name))
        return self
