"""Settings of the training objectives, a class each; `mmtard/distillation/methods/` holds their mathematics."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Union, get_args

from pydantic import Field, model_validator

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


class Clean(MethodSettings):
    """Cross-entropy on clean images, which attacks none."""

    name: Literal["clean"]


class TeCoA(MethodSettings):
    """Cross-entropy on adversarial images."""

    attack: ClassVar[str | None] = "ce"
    name: Literal["tecoa"]


class FARE(MethodSettings):
    """Embeddings of adversarial images near those of the untouched student; no labels."""

    teachers: ClassVar[tuple[str, ...]] = (START,)
    attack: ClassVar[str | None] = "l2_embedding"
    labels: ClassVar[bool] = False
    classes: ClassVar[bool] = False
    name: Literal["fare"]


class SimCLIP(MethodSettings):
    """As fare, by the direction of the embeddings; no labels."""

    teachers: ClassVar[tuple[str, ...]] = (START,)
    attack: ClassVar[str | None] = "l2_embedding"
    labels: ClassVar[bool] = False
    classes: ClassVar[bool] = False
    name: Literal["sim_clip"]


class PMGAFT(MethodSettings):
    """As tecoa, and near the untouched student's and one's own clean predictions."""

    teachers: ClassVar[tuple[str, ...]] = (START,)
    attack: ClassVar[str | None] = "ce"
    name: Literal["pmg_aft"]
    general_weight: Number = Field(1.0, ge=0, description="weight of KL(p_T0(x') || p_S(x'))")
    clean_weight: Number = Field(1.0, ge=0, description="weight of KL(p_S(x) || p_S(x'))")


class TGAZSR(MethodSettings):
    """As tecoa, and text-guided attention near the untouched student's."""

    teachers: ClassVar[tuple[str, ...]] = (START,)
    attack: ClassVar[str | None] = "ce"
    tokens: ClassVar[bool] = True
    name: Literal["tga_zsr"]
    alpha: Number = Field(0.08, ge=0, description="weight of the attention's distance on the adversarial image")
    beta: Number = Field(0.05, ge=0, description="weight of the attention's distance on the clean image")


class AGFT(MethodSettings):
    """Adversarial predictions near the untouched student's softened clean ones; no labels."""

    teachers: ClassVar[tuple[str, ...]] = (START,)
    attack: ClassVar[str | None] = "kl_start"
    labels: ClassVar[bool] = False
    name: Literal["agft"]
    gamma: Number = Field(0.4, gt=0, le=1, description="softens the target: factor of the untouched student's logits")
    sharpness: Number = Field(
        1.8, gt=0, description="factor of both models' logits; 1.8 makes CLIP's logit scale of 100 the paper's 180"
    )


class LORE(MethodSettings):
    """As fare, with the clean embedding bound to the untouched student's by learned multipliers; no labels."""

    teachers: ClassVar[tuple[str, ...]] = (START,)
    attack: ClassVar[str | None] = "l2_embedding"
    labels: ClassVar[bool] = False
    classes: ClassVar[bool] = False
    name: Literal["lore"]
    bound: Bound = Bound()


class TRADES(MethodSettings):
    """Cross-entropy on clean images, and adversarial predictions near the clean ones."""

    attack: ClassVar[str | None] = "kl_self"
    name: Literal["trades"]
    beta: Number = Field(6.0, ge=0, description="weight of KL(p_S(x) || p_S(x')) against cross-entropy")


class ARD(MethodSettings):
    """One robust teacher, softened by a temperature, against cross-entropy."""

    teachers: ClassVar[tuple[str, ...]] = ("robust",)
    attack: ClassVar[str | None] = "ce"
    name: Literal["ard"]
    alpha: Number = Field(1.0, ge=0, le=1, description="weight of the distillation term against cross-entropy")
    temperature: Number = Field(30.0, gt=0, description="divides both models' logits in the distillation term")
    teacher_view: Literal["clean", "adv"] = Field("clean", description="the image the teacher sees")

    @property
    def labels(self) -> bool:
        """Whether cross-entropy has any weight."""
        return self.alpha < 1


class RSLAD(MethodSettings):
    """Soft labels of one robust teacher, in the loss and in the attack; no labels."""

    teachers: ClassVar[tuple[str, ...]] = ("robust",)
    attack: ClassVar[str | None] = "kl_robust"
    labels: ClassVar[bool] = False
    name: Literal["rslad"]
    alpha: Number = Field(
        5 / 6, ge=0, le=1, description="weight of the adversarial image's term against the clean image's"
    )


class IAD(MethodSettings):
    """One robust teacher, trusted as far as it withstands the student's attack."""

    teachers: ClassVar[tuple[str, ...]] = ("robust",)
    attack: ClassVar[str | None] = "ce"
    name: Literal["iad"]
    beta: Number = Field(0.1, gt=0, description="exponent of the teacher's confidence")


class AdaAD(MethodSettings):
    """One robust teacher, attacked where student and teacher part; no labels."""

    teachers: ClassVar[tuple[str, ...]] = ("robust",)
    attack: ClassVar[str | None] = "kl_adaptive"
    labels: ClassVar[bool] = False
    name: Literal["adaad"]
    alpha: Number = Field(
        1.0, ge=0, le=1, description="weight of the adversarial image's term against the clean image's"
    )


class MTARD(MethodSettings):
    """A clean and a robust teacher, whose weights follow their losses; no labels."""

    teachers: ClassVar[tuple[str, ...]] = ("clean", "robust")
    attack: ClassVar[str | None] = "ce"
    labels: ClassVar[bool] = False
    name: Literal["mtard"]
    rate: Number = Field(
        0.025, ge=0, le=1, description="rate at which the teachers' weights follow their relative losses"
    )


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


METHOD_CLASSES = (
    Clean,
    TeCoA,
    FARE,
    PMGAFT,
    TGAZSR,
    SimCLIP,
    AGFT,
    LORE,
    TRADES,
    ARD,
    RSLAD,
    IAD,
    AdaAD,
    MTARD,
    MMTARD,
)
METHODS: dict[str, type[MethodSettings]] = {get_args(m.model_fields["name"].annotation)[0]: m for m in METHOD_CLASSES}
Method = Annotated[Union[METHOD_CLASSES], Field(discriminator="name")]  # noqa: UP007  (made of the tuple)
