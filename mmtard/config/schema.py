"""Every setting of a run: once, with its default, its bounds and what it means. Imports no torch."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal, Union, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator


def parse_fraction(value: Any) -> Fraction:
    """`2/255`, `0.0078` or a number as an exact Fraction; ValueError with the remedy otherwise."""
    try:
        return Fraction(str(value).replace(" ", ""))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"'{value}' is not a fraction; write it as 2/255 or 0.0078") from None


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"'{value}' is not a number")
    return value


def show_pixels(value: Fraction) -> str:
    """A radius or step as the field writes it: over 255 where that is exact (3/255, not 1/85)."""
    return f"{value * 255}/255" if value.denominator != 1 and (value * 255).denominator == 1 else str(value)


Pixels = Annotated[Fraction, BeforeValidator(parse_fraction), PlainSerializer(show_pixels, return_type=str)]
Ratio = Annotated[Fraction, BeforeValidator(parse_fraction), PlainSerializer(str, return_type=str)]
Int = Annotated[int, BeforeValidator(_no_bool)]
Number = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


# ---------------------------------------------------------------- models


class Model(Section):
    """A CLIP whose image tower is used."""

    arch: str | None = Field(None, description="open_clip architecture, or a .json model config; null when `weights` brings it")
    weights: str = Field(
        ...,
        description="`random`, an open_clip tag, `hf-hub:org/name`, an exported folder, a run or checkpoint folder, "
        "an open_clip checkpoint file, or an image-tower state_dict file",
    )
    text: str | None = Field(None, description="weights of the text tower and logit scale, when `weights` holds an image tower alone")
    quick_gelu: bool | None = Field(None, description="the activation the weights were trained with; null: as their source says")
    ema: bool = Field(False, description="take the moving average of a run's or checkpoint's weights, which train.ema kept")


class Lora(Section):
    """Low-rank adapters that are trained in the place of the tower."""

    r: Int = Field(16, ge=1, description="rank")
    alpha: Number = Field(16.0, gt=0, description="the update is scaled by alpha / r")
    dropout: Number = Field(0.1, ge=0, lt=1, description="on the adapters' input, in training")
    targets: Literal["attention"] = Field("attention", description="qkv and output projections")


class Student(Model):
    lora: Lora | None = Field(None, description="train adapters alone; null: the whole tower")


class Teacher(Model):
    placement: Literal["replicated", "sharded"] = "replicated"


# ---------------------------------------------------------------- method and attack


class MethodSettings(Section):
    """Settings of one objective; `mmtard/methods/<name>.py` holds its mathematics."""

    teachers: ClassVar[tuple[str, ...]] = ()
    attack: ClassVar[str | None] = None  # the objective its attack maximises, unless attack.objective says otherwise


class Clean(MethodSettings):
    name: Literal["clean"]


class TeCoA(MethodSettings):
    attack: ClassVar[str | None] = "ce"
    name: Literal["tecoa"]


class ARD(MethodSettings):
    teachers: ClassVar[tuple[str, ...]] = ("robust",)
    attack: ClassVar[str | None] = "ce"
    name: Literal["ard"]
    alpha: Number = Field(1.0, ge=0, le=1, description="weight of the distillation term against cross-entropy")
    temperature: Number = Field(30.0, gt=0)
    teacher_view: Literal["clean", "adv"] = Field("clean", description="the image the teacher sees")


class MMTARD(MethodSettings):
    teachers: ClassVar[tuple[str, ...]] = ("clean", "robust")
    attack: ClassVar[str | None] = "kl_clean"
    name: Literal["mmtard"]
    weighting: Literal["official", "confidence_sigmoid"] = "official"
    robust_weight: Number = Field(50.0, ge=0, description="official: factor of the robust teacher's cosine")
    clean_weight: Number = Field(5.0, ge=0, description="official: factor of the clean teacher's cosine")
    slope: Number = Field(4.0, description="confidence_sigmoid: k of sigmoid(k * (p_Tr - p_Tc) + b)")
    bias: Number = Field(0.0, description="confidence_sigmoid: b")
    budget: Number = Field(1.0, gt=0, description="confidence_sigmoid: what the two weights of a sample add up to")


Method = Annotated[Union[Clean, TeCoA, ARD, MMTARD], Field(discriminator="name")]
METHODS: dict[str, type[MethodSettings]] = {
    get_args(m.model_fields["name"].annotation)[0]: m for m in get_args(get_args(Method)[0])
}

# The loss each attack objective maximises, and the teacher it asks for; `mmtard/objectives.py` holds them.
ATTACK_OBJECTIVES: dict[str, str | None] = {
    "ce": None,
    "kl_clean": "clean",
    "kl_robust": "robust",
    "kl_self": None,
}


class Attack(Section):
    algorithm: Literal["pgd", "apgd"] = "pgd"
    objective: str | None = Field(None, description="the loss to maximise; null: the method's own")
    norm: Literal["linf", "l2"] = "linf"
    eps: Pixels = Field(Fraction(2, 255), ge=0)
    step_size: Pixels = Field(Fraction(1, 255), gt=0, description="pgd's step; apgd sets its own")
    steps: Int = Field(10, ge=1)
    momentum: Number = Field(0.0, ge=0, lt=1, description="pgd: momentum of the normalised gradient")
    random_start: bool = True
    alarm_every: Int | None = Field(100, ge=1, description="steps: 1 alone: how often its student is tried with 10 steps; null: never")
    alarm_ratio: Number = Field(0.25, gt=0, le=1, description="of the one-step accuracy; a multi-step accuracy below it sets off the alarm")


# ---------------------------------------------------------------- data


class Cache(Section):
    """Node-local staging of remote shards."""

    dir: str | None = Field(None, description="null: $TMPDIR/mmtard-shards")
    max_gb: Number = Field(100.0, gt=0)
    ahead: Int = Field(4, ge=0, description="shards fetched before they are needed, for each rank")


class Data(Section):
    shards: str | list[str] = Field(..., description="a folder, a brace pattern, a tar, pipe:..., or a list of these")
    index: str | None = Field(None, description="index file; null: beside the shards")
    targets: Literal["labels", "captions"] = Field("labels", description="a sample's true class: its label, or its caption (.txt) among those of the global batch")
    classnames: str | None = Field(None, description="file, one name a line; null: classnames.txt beside the shards")
    templates: str | list[str] = Field(["This is a photo of a {}"], description="prompts with {} or {c}, or a file of them")
    resize: Int | None = Field(None, ge=1, description="shorter side before the crop; null: the crop's size")
    crop_scale: tuple[Number, Number] | None = Field(None, description="random resized crop area; null: centre crop")
    flip: bool = False
    lanes: Int = Field(64, ge=1, description="parallel reading positions; a multiple of every world size to be used")
    window: Int = Field(1024, ge=1, description="samples shuffled together in a lane")
    workers: Int = Field(2, ge=0, description="loader processes a rank")
    max_replaced: Ratio = Field(Fraction(1, 100), ge=0, le=1, description="share of unreadable samples above which the run stops")
    cache: Cache = Cache()


# ---------------------------------------------------------------- training


class Train(Section):
    steps: Int = Field(..., ge=1)
    batch_size: Int = Field(..., ge=1, description="global")
    micro_batch_size: Int | None = Field(None, ge=1, description="most samples a rank takes at once; null: all of its share")
    lr: Number = Field(2e-5, gt=0)
    warmup_steps: Int = Field(0, ge=0)
    weight_decay: Number = Field(1e-4, ge=0)
    betas: tuple[Number, Number] = (0.9, 0.999)
    grad_clip: Number | None = Field(None, gt=0, description="largest global gradient norm; null: no clipping")
    ema: Number | None = Field(None, gt=0, lt=1, description="decay of an average of the weights, kept in float32 beside them; null: none")
    max_bad_steps: Int = Field(10, ge=1, description="non-finite steps in a row after which the run stops")


class Engine(Section):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["bf16", "float32"] = "bf16"
    zero_stage: Literal[0, 1, 2, 3] = 2


class Checkpoint(Section):
    every: Int = Field(500, ge=1)
    keep_last: Int = Field(2, ge=1)
    keep_every: Int | None = Field(None, ge=1, description="checkpoints at multiples of this step are kept for good")


class Resume(Section):
    """What a run survives. How each of its starts ended stands in resume.jsonl."""

    allow: list[str] = Field([], description="dotted keys that may differ from the run's stored configuration")
    max_timeouts: Int | None = Field(None, ge=0, description="starts that may end because the job's time is up; null: no bound")
    max_preemptions: Int | None = Field(None, ge=0, description="starts that may end by another signal to the job; null: no bound")
    max_losses: Int | None = Field(5, ge=0, description="starts that may end because a rank was lost or hung; null: no bound")
    max_starts_without_progress: Int = Field(3, ge=1, description="starts in a row from one and the same checkpoint")
    watchdog_minutes: Number = Field(10.0, gt=0, lt=30, description="time of a part of a step (its data, update, checkpoint) after which it counts as hung")


class WandB(Section):
    """Weights & Biases; needs `pip install mmtard[wandb]`."""

    project: str
    entity: str | None = Field(None, description="user or team; null: the one you are logged in as")
    name: str | None = Field(None, description="null: the run folder's name")
    tags: list[str] = []
    mode: Literal["online", "offline", "disabled"] | None = Field(None, description="null: as $WANDB_MODE says, else online")


class Log(Section):
    every: Int = Field(10, ge=1, description="steps between console lines; metrics.jsonl has every step")
    tensorboard: bool = True
    wandb: WandB | None = None


class Config(Section):
    run_dir: str
    seed: Int = Field(0, ge=0)
    student: Student
    teachers: dict[str, Teacher] = {}
    method: Method
    attack: Attack = Attack()
    data: Data
    train: Train
    engine: Engine = Engine()
    checkpoint: Checkpoint = Checkpoint()
    resume: Resume = Resume()
    log: Log = Log()

    @property
    def attack_objective(self) -> str | None:
        """The loss the training attack maximises; None for a method that trains on clean images."""
        return None if self.method.attack is None else self.attack.objective or self.method.attack

    @model_validator(mode="after")
    def _parts_fit(self):
        objective = self.attack.objective
        if objective is not None and objective not in ATTACK_OBJECTIVES:
            raise ValueError(f"attack.objective: unknown objective '{objective}'; known: {', '.join(ATTACK_OBJECTIVES)}")
        needed = set(self.method.teachers)
        if self.attack_objective is not None:
            needed |= {ATTACK_OBJECTIVES[self.attack_objective]} - {None}
        for name in sorted(needed - set(self.teachers)):
            raise ValueError(f"teachers.{name}: method '{self.method.name}' with attack objective '{self.attack_objective}' needs this teacher; add it")
        for name in sorted(set(self.teachers) - needed):
            raise ValueError(f"teachers.{name}: no part of method '{self.method.name}' uses this teacher; remove it (used: {', '.join(sorted(needed)) or 'none'})")
        if self.train.batch_size % self.data.lanes:
            raise ValueError(f"data.lanes: {self.data.lanes} lanes do not divide train.batch_size {self.train.batch_size}; make it a divisor of the batch size")
        if self.train.warmup_steps > self.train.steps:
            raise ValueError(f"train.warmup_steps: {self.train.warmup_steps} is more than train.steps {self.train.steps}; lower it")
        return self
