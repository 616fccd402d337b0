"""Settings of MMT-ARD, the method of this project, with the weightings and the trusts it chooses from."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from .method_settings import MethodSettings
from .values import Number

# Weighting -> whether it reads the samples' labels.
# `FUNCTIONS` in `mmtard/distillation/weighting.py` has the function of each.
WEIGHTINGS: dict[str, bool] = {
    "uniform": False,
    "official": True,
    "constant": False,
    "confidence_sigmoid": True,
    "hardness": True,
    "entropy": False,
    "mtard": False,
}


# What the target of a teacher of the adversarial image is mixed with -> whether it reads the samples' labels.
# `mmtard/distillation/trust.py` has the mathematics of each.
TRUSTS: dict[str, bool] = {"whole": False, "label": True, "clean": False, "uncertainty": False}


class MMTARD(MethodSettings):
    """Any number of teachers, weighted sample by sample: the method of this project."""

    attack: ClassVar[str | None] = "kl_clean"
    name: Literal["mmtard"]
    views: dict[str, Literal["clean", "adv", "clean_for_adv"]] = Field(
        {"robust": "adv", "clean": "clean"},
        min_length=1,
        description="each teacher's image, which is also the student's for its term; clean_for_adv: the teacher sees "
        "the clean image and teaches the adversarial one, so that its embeddings can be stored",
    )
    temperatures: dict[str, Annotated[Number, Field(gt=0)]] = Field(
        {},
        description="divides a teacher's and the student's logits in that teacher's term, which is multiplied by "
        "its square; 1 for a teacher that is not named",
    )
    trust: Literal[tuple(TRUSTS)] = Field(
        "whole",
        description="what a teacher of the adversarial image hands its target over to, as far as it is unsure: "
        "whole: nothing; label: the true class; clean: the clean teachers' prediction; uncertainty: the student's own "
        "class, by the teacher's entropy (Adv-W2S)",
    )
    weighting: Literal[tuple(WEIGHTINGS)] = Field(
        "official", description="how each sample's loss is weighted over the teachers; official: as published"
    )
    robust_weight: Number = Field(
        50.0, ge=0, description="official, constant: factor of a teacher that sees the adversarial image"
    )
    clean_weight: Number = Field(
        5.0, ge=0, description="official, constant: factor of a teacher that sees the clean image"
    )
    slope: Number = Field(
        4.0, description="confidence_sigmoid, entropy, hardness: how strongly the weights follow confidence"
    )
    bias: Number = Field(
        0.0, description="confidence_sigmoid, entropy: added for a teacher that sees the adversarial image"
    )
    budget: Number = Field(
        1.0,
        gt=0,
        description="all but official and constant: what a sample's weights add up to (hardness: at confidence 1)",
    )
    rate: Number = Field(0.025, ge=0, le=1, description="mtard: rate at which the weights follow the relative losses")
    cross_modal_weight: Number = Field(
        0.0, ge=0, description="weight of the term that keeps image-text similarities near the teachers'"
    )

    @property
    def teachers(self) -> tuple[str, ...]:
        """The names that have a view, in their order."""
        return tuple(self.views)

    @property
    def labels(self) -> bool:
        """Whether the weighting or the trust looks at the samples' labels."""
        return WEIGHTINGS[self.weighting] or TRUSTS[self.trust]

    @model_validator(mode="after")
    def _parts_fit(self):
        views = self.views
        for name in self.temperatures.keys() - views.keys():
            raise ValueError(
                f"method.temperatures.{name}: method.views names no such teacher (it has {', '.join(views)}); "
                "remove it, or correct the name"
            )
        if self.trust != "whole" and set(views.values()) == {"clean"}:
            raise ValueError(
                f"method.trust: '{self.trust}' is of teachers of the adversarial image, and method.views has none; "
                "leave it out, or set a view to adv or clean_for_adv"
            )
        if self.trust == "clean" and "clean" not in views.values():
            raise ValueError(
                "method.trust: 'clean' needs a teacher of the clean image, and method.views has none; add one "
                "(clean: clean), or set method.trust=label"
            )
        return self
