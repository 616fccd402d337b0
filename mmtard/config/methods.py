"""Settings of the objectives and of the attack inside training; `mmtard/methods/` and `mmtard/objectives.py` hold their mathematics."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field

from .values import Number, Section

START = "start"  # the teacher that is the student before training; also the folder of a run that holds it


class MethodSettings(Section):
    """Settings of one objective: what it needs of a run, and its equation's constants.

    `teachers` are the names it asks; `start` among them is the untouched student, which the configuration need not list.
    """

    teachers: ClassVar[tuple[str, ...]] = ()
    attack: ClassVar[str | None] = None  # the objective its attack maximises, unless attack.objective says otherwise
    labels: ClassVar[bool] = True  # whether its loss reads the samples' labels
    classes: ClassVar[bool] = True  # whether it reads predictions of classes, not embeddings alone
    tokens: ClassVar[bool] = False  # whether it reads patch tokens beside the image embedding


class Clean(MethodSettings):
    name: Literal["clean"]


class TeCoA(MethodSettings):
    attack: ClassVar[str | None] = "ce"
    name: Literal["tecoa"]


class FARE(MethodSettings):
    teachers: ClassVar[tuple[str, ...]] = (START,)
    attack: ClassVar[str | None] = "l2_embedding"
    labels: ClassVar[bool] = False
    classes: ClassVar[bool] = False
    name: Literal["fare"]


class SimCLIP(MethodSettings):
    teachers: ClassVar[tuple[str, ...]] = (START,)
    attack: ClassVar[str | None] = "l2_embedding"
    labels: ClassVar[bool] = False
    classes: ClassVar[bool] = False
    name: Literal["sim_clip"]


class PMGAFT(MethodSettings):
    teachers: ClassVar[tuple[str, ...]] = (START,)
    attack: ClassVar[str | None] = "ce"
    name: Literal["pmg_aft"]
    general_weight: Number = Field(1.0, ge=0, description="weight of KL(p_T0(x') || p_S(x'))")
    clean_weight: Number = Field(1.0, ge=0, description="weight of KL(p_S(x) || p_S(x'))")


class TGAZSR(MethodSettings):
    teachers: ClassVar[tuple[str, ...]] = (START,)
    attack: ClassVar[str | None] = "ce"
    tokens: ClassVar[bool] = True
    name: Literal["tga_zsr"]
    alpha: Number = Field(0.08, ge=0, description="weight of the attention's distance on the adversarial image")
    beta: Number = Field(0.05, ge=0, description="weight of the attention's distance on the clean image")


class TRADES(MethodSettings):
    attack: ClassVar[str | None] = "kl_self"
    name: Literal["trades"]
    beta: Number = Field(6.0, ge=0, description="weight of KL(p_S(x) || p_S(x')) against cross-entropy")


class ARD(MethodSettings):
    teachers: ClassVar[tuple[str, ...]] = ("robust",)
    attack: ClassVar[str | None] = "ce"
    name: Literal["ard"]
    alpha: Number = Field(1.0, ge=0, le=1, description="weight of the distillation term against cross-entropy")
    temperature: Number = Field(30.0, gt=0)
    teacher_view: Literal["clean", "adv"] = Field("clean", description="the image the teacher sees")

    @property
    def labels(self) -> bool:
        return self.alpha < 1


class RSLAD(MethodSettings):
    teachers: ClassVar[tuple[str, ...]] = ("robust",)
    attack: ClassVar[str | None] = "kl_robust"
    labels: ClassVar[bool] = False
    name: Literal["rslad"]
    alpha: Number = Field(
        5 / 6, ge=0, le=1, description="weight of the adversarial image's term against the clean image's"
    )


class IAD(MethodSettings):
    teachers: ClassVar[tuple[str, ...]] = ("robust",)
    attack: ClassVar[str | None] = "ce"
    name: Literal["iad"]
    beta: Number = Field(0.1, gt=0, description="exponent of the teacher's confidence")


class AdaAD(MethodSettings):
    teachers: ClassVar[tuple[str, ...]] = ("robust",)
    attack: ClassVar[str | None] = "kl_adaptive"
    labels: ClassVar[bool] = False
    name: Literal["adaad"]
    alpha: Number = Field(
        1.0, ge=0, le=1, description="weight of the adversarial image's term against the clean image's"
    )


class MTARD(MethodSettings):
    teachers: ClassVar[tuple[str, ...]] = ("clean", "robust")
    attack: ClassVar[str | None] = "ce"
    labels: ClassVar[bool] = False
    name: Literal["mtard"]
    rate: Number = Field(
        0.025, ge=0, le=1, description="rate at which the teachers' weights follow their relative losses"
    )


# Whether a weighting of `mmtard` reads the samples' labels; `mmtard/weighting.py` holds them.
WEIGHTINGS: dict[str, bool] = {
    "uniform": False,
    "official": True,
    "constant": False,
    "confidence_sigmoid": True,
    "hardness": True,
    "entropy": False,
    "mtard": False,
}


class MMTARD(MethodSettings):
    attack: ClassVar[str | None] = "kl_clean"
    name: Literal["mmtard"]
    views: dict[str, Literal["clean", "adv"]] = Field(
        {"robust": "adv", "clean": "clean"},
        min_length=1,
        description="each teacher's image, which is also the student's for its term",
    )
    weighting: Literal[tuple(WEIGHTINGS)] = "official"
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
        return tuple(self.views)

    @property
    def labels(self) -> bool:
        return WEIGHTINGS[self.weighting]


Method = Annotated[
    Clean | TeCoA | FARE | PMGAFT | TGAZSR | SimCLIP | TRADES | ARD | RSLAD | IAD | AdaAD | MTARD | MMTARD,
    Field(discriminator="name"),
]
METHODS: dict[str, type[MethodSettings]] = {
    get_args(m.model_fields["name"].annotation)[0]: m for m in get_args(get_args(Method)[0])
}
