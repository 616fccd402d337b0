"""What the settings of every training objective have, and of the term that LORE brought."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from .values import Int, Number, Section

START = "start"  # the teacher that is the student before training; also the folder of a run that holds it


class Bound(Section):
    """The clean embedding bound to the untouched student's, by a multiplier for each sample."""

    rho: Number = Field(0.1, gt=0, description="bound of ||z_S(x) - z_start(x)||^2 in parts of ||z_start(x)||^2")
    multipliers: Literal["network", "sample"] = Field(
        "network",
        description="a network of the untouched student's embedding, as published, or a variable of each sample's own, "
        "for data that is seen many times",
    )
    dual_every: Int = Field(5, ge=1, description="network: updates of the student for each of its own")
    dual_lr: Number | None = Field(
        None, gt=0, description="learning rate of the multipliers; null: 5e-4 of a network, 1 of variables"
    )
    hidden: Int = Field(512, ge=1, description="network: width of its hidden layer")

    @property
    def rate(self) -> float:
        """The learning rate of the multipliers."""
        return self.dual_lr or (5e-4 if self.multipliers == "network" else 1.0)


class MethodSettings(Section):
    """Settings of one objective: what it needs of a run, and its equation's constants.

    `teachers` are the names it asks; `start` among them is the untouched student, which need not be listed.
    """

    teachers: ClassVar[tuple[str, ...]] = ()
    attack: ClassVar[str | None] = None  # the objective its attack maximises, unless attack.objective says otherwise
    labels: ClassVar[bool] = True  # whether its loss reads the samples' labels
    classes: ClassVar[bool] = True  # whether it reads predictions of classes, not embeddings alone
    tokens: ClassVar[bool] = False  # whether it reads patch tokens beside the image embedding
