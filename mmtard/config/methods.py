"""Settings of the training objectives, a class each; `mmtard/distillation/methods/` holds their mathematics."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Union, get_args

from pydantic import Field

from .method_settings import START, Bound, MethodSettings
from .mmtard_method import MMTARD
from .values import Number


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
