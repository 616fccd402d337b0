"""Settings of the attack inside training, and the objectives that it may maximise."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, model_validator

from .method_settings import START
from .values import Int, Number, Pixels, Ratio, Section, check_unit


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
    "kl_start": AttackObjective(reference=START),
    "kl_self": AttackObjective(reference="student"),
    "kl_adaptive": AttackObjective(through_teacher="robust"),
    "l2_embedding": AttackObjective(reference=START, classes=False),
}


class Ramp(Section):
    """A weaker attack early in training, which reaches full strength at a given update."""

    until: Int = Field(..., ge=1, description="updates after which the attack is at full strength")
    eps: Ratio = Field(
        Fraction(1), ge=0, le=1, description="share of eps (and step) that it begins with; rises linearly"
    )
    steps: Int | None = Field(
        None, ge=1, description="steps that it begins with, of attack.steps; more in equal stages. null: all of them"
    )


class Attack(Section):
    """The attack that makes the adversarial images of the training."""

    algorithm: Literal["pgd", "apgd", "nfgsm"] = Field(
        "pgd",
        description="projected gradient ascent, Auto-PGD, or N-FGSM: one step of eps from a noisy start, without "
        "projection",
    )
    objective: str | None = Field(None, description="the loss to maximise; null: the method's own")
    fusion: dict[str, Annotated[Number, Field(gt=0)]] | None = Field(
        None, min_length=1, description="kl_fused: relative weight of each teacher; null: all listed teachers alike"
    )
    norm: Literal["linf", "l2"] = Field("linf", description="of the perturbation; l2 is over all pixels of an image")
    eps: Pixels = Field(Fraction(2, 255), ge=0, description="largest perturbation, in units of [0,1]")
    eps_factor: Ratio = Field(
        Fraction(1),
        gt=0,
        description="training's eps and step as a multiple of these; the probe and evaluations keep attack.eps",
    )
    step_size: Pixels | None = Field(
        Fraction(1, 255),
        gt=0,
        description="pgd's step; null: 1.25 eps for one step and 2.5 eps / steps for more. apgd and nfgsm set "
        "their own",
    )
    noise: Number = Field(2.0, ge=0, description="nfgsm: its start is uniform within so many eps")
    ramp: Ramp | None = Field(None, description="begin with a weaker attack; null: full strength from the start")
    steps: Int = Field(10, ge=1, description="gradient steps of each attack")
    restarts: Int = Field(
        1, ge=1, description="attacks from so many random starts, of which each sample keeps the worst"
    )
    momentum: Number = Field(0.0, ge=0, lt=1, description="pgd: momentum of the normalised gradient")
    random_start: bool = Field(True, description="start anywhere in the ball; false: at the image itself")
    alarm_every: Int | None = Field(
        100, ge=1, description="of an attack of one step: how often its student is tried with 10 steps; null: never"
    )
    alarm_ratio: Number = Field(
        0.25, gt=0, le=1, description="of the one-step accuracy; a multi-step accuracy below it sets off the alarm"
    )
    alarm_steps: Int | None = Field(
        3, ge=2, description="steps of 2.5 eps / steps that the attack has from the alarm on; null: it only reports"
    )

    @model_validator(mode="after")
    def _within_pixels(self):
        for name in ("eps", "step_size"):
            if self.norm == "linf" and getattr(self, name) is not None:
                check_unit(f"attack.{name}", getattr(self, name))
        if self.norm == "linf" and self.eps * self.eps_factor >= 1:
            raise ValueError(
                f"attack.eps_factor: {float(self.eps_factor):g} times attack.eps is the whole range of a pixel or "
                "more; write 1 for training at attack.eps itself"
            )
        return self

    @model_validator(mode="after")
    def _parts_fit(self):
        ramp = self.ramp
        if ramp is not None and ramp.steps is not None and ramp.steps > self.steps:
            raise ValueError(
                f"attack.ramp.steps: {ramp.steps} is more than attack.steps {self.steps}, which a ramp leads up to; "
                "lower it"
            )
        if ramp is not None and ramp.eps == 1 and ramp.steps in (None, self.steps):
            raise ValueError(
                "attack.ramp: it begins at full strength; set attack.ramp.eps or attack.ramp.steps, or leave it out"
            )
        if self.algorithm == "nfgsm":
            for wrong, remedy in (
                (self.steps != 1, f"takes one step, not {self.steps}; set attack.steps=1"),
                (self.norm != "linf", f"is not defined for {self.norm}; set attack.norm=linf"),
                (self.restarts > 1, f"has one start, not {self.restarts}; set attack.restarts=1"),
                (not self.random_start, "is its random start; set attack.random_start=true"),
            ):
                if wrong:
                    raise ValueError(f"attack.algorithm: nfgsm {remedy}, or take pgd")
        return self

    def at(self, update: int, fell_back: bool = False) -> Attack:
        """The attack of update `update` (0-based), with an eps and a step of its own; itself where nothing changes it.

        fell_back: the alarm went off before, so that an attack of fewer steps becomes pgd with `alarm_steps` steps.
        """
        share, steps = self.eps_factor, self.steps
        if self.ramp is not None and update < self.ramp.until:
            share *= self.ramp.eps + (1 - self.ramp.eps) * Fraction(update + 1, self.ramp.until)
            first = self.ramp.steps or steps
            steps = first + (steps - first) * update // self.ramp.until
        algorithm, step_size = self.algorithm, self.step_size
        if fell_back and steps < (self.alarm_steps or 0):
            algorithm, step_size, steps = "pgd", None, self.alarm_steps
        if (share, steps, step_size, algorithm) == (1, self.steps, self.step_size, self.algorithm) and step_size:
            return self
        eps = self.eps * share
        step = step_size * share if step_size else matched_step(eps, steps)
        return self.model_copy(
            update={
                "algorithm": algorithm, "eps": eps, "step_size": step, "steps": steps,
                "eps_factor": Fraction(1), "ramp": None,
            }
        )  # fmt: skip


def matched_step(eps: Fraction, steps: int) -> Fraction:
    """The step of an attack of so many steps: 1.25 eps for one, 2.5 eps / steps for more; above 0 whatever eps is.

    The one step is that of Wong et al., "Fast is better than free", ICLR 2020; the others can cross the whole ball.
    """
    return max(eps * Fraction(5, 4) if steps == 1 else eps * Fraction(5, 2) / steps, Fraction(1, 2**40))
