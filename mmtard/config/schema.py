"""Every setting of a run: once, with its default, its bounds and what it means. Imports no torch."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from .attack import ATTACK_OBJECTIVES, Attack
from .methods import START, Method
from .values import Int, Number, PathText, Pixels, Ratio, Section

# ---------------------------------------------------------------- models


class Model(Section):
    """A CLIP whose image tower is used."""

    arch: PathText | None = Field(
        None, description="open_clip architecture, or a .json model config; null when `weights` brings it"
    )
    weights: PathText = Field(
        ...,
        description="`random`, an open_clip tag, `hf-hub:org/name`, an exported folder, a run or checkpoint folder, "
        "an open_clip checkpoint file, or an image-tower state_dict file",
    )
    text: PathText | None = Field(
        None, description="weights of the text tower and logit scale, when `weights` holds an image tower alone"
    )
    quick_gelu: bool | None = Field(
        None, description="the activation the weights were trained with; null: as their source says"
    )
    ema: bool = Field(
        False, description="take the moving average of a run's or checkpoint's weights, which train.ema kept"
    )


class Lora(Section):
    """Low-rank adapters that are trained in the place of the tower."""

    r: Int = Field(16, ge=1, description="rank")
    alpha: Number = Field(16.0, gt=0, description="the update is scaled by alpha / r")
    dropout: Number = Field(0.1, ge=0, lt=1, description="on the adapters' input, in training")
    targets: Literal["attention"] = Field("attention", description="qkv and output projections")


class Student(Model):
    lora: Lora | None = Field(None, description="train adapters alone; null: the whole tower")
    batch_norm: Literal["frozen", "synced"] = Field(
        "frozen", description="a ResNet's statistics: the pretrained ones, or each step's over all ranks"
    )


class Teacher(Model):
    weights: PathText = Field(
        START, description="as a student's; only the teacher `start` may leave it out: it is then the untouched student"
    )
    placement: Literal["replicated", "sharded"] = "replicated"
    stored: bool = Field(
        False,
        description="read its embeddings, which `mmtard cache` stored, instead of running it; for a teacher that sees clean images alone",
    )


# ---------------------------------------------------------------- data


class Cache(Section):
    """Node-local staging of remote shards."""

    dir: str | None = Field(None, description="null: $TMPDIR/mmtard-shards-UID")
    max_gb: Number = Field(100.0, gt=0)
    ahead: Int = Field(4, ge=0, description="shards fetched before they are needed, for each rank")


Area = Annotated[Number, Field(gt=0, le=1)]


class Data(Section):
    shards: PathText | list[PathText] = Field(
        ..., description="a folder, a brace pattern, a tar, pipe:..., or a list of these"
    )
    index: PathText | None = Field(None, description="index file; null: beside the shards")
    targets: Literal["labels", "captions", "none"] = Field(
        "labels",
        description="a sample's true class: its label, its caption (.txt) among those of the global batch, or none, for a method of embeddings alone",
    )
    classnames: PathText | None = Field(
        None, description="file, one name a line; null: classnames.txt beside the shards"
    )
    templates: PathText | list[str] = Field(
        ["This is a photo of a {}"], description="prompts with {} or {c}, or a file of them"
    )
    resize: Int | None = Field(None, ge=1, description="shorter side before the crop; null: the crop's size")
    crop_scale: tuple[Area, Area] | None = Field(None, description="random resized crop area; null: centre crop")
    flip: bool = False
    views: Int | None = Field(
        None,
        ge=1,
        description="fixed augmentations a sample, of which epoch e takes number e mod views; null: a new one each epoch",
    )
    embeddings: PathText | None = Field(
        None, description="folder of stored teacher embeddings; null: embeddings/ beside the index"
    )
    lanes: Int = Field(64, ge=1, description="parallel reading positions; a multiple of every world size to be used")
    window: Int = Field(1024, ge=1, description="samples shuffled together in a lane")
    workers: Int = Field(2, ge=0, description="loader processes a rank")
    max_replaced: Ratio = Field(
        Fraction(1, 100), ge=0, le=1, description="share of unreadable samples above which the run stops"
    )
    cache: Cache = Cache()

    @property
    def augmented(self) -> bool:
        """Whether a sample's image depends on a seed."""
        return self.crop_scale is not None or self.flip


# ---------------------------------------------------------------- training


Decay = Annotated[Number, Field(ge=0, lt=1)]


class Train(Section):
    steps: Int = Field(..., ge=1)
    batch_size: Int = Field(..., ge=1, description="global")
    micro_batch_size: Int | None = Field(
        None, ge=1, description="most samples a rank takes at once; null: all of its share"
    )
    lr: Number = Field(2e-5, gt=0)
    warmup_steps: Int = Field(0, ge=0)
    weight_decay: Number = Field(1e-4, ge=0)
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    grad_clip: Number | None = Field(None, gt=0, description="largest global gradient norm; null: no clipping")
    ema: Number | None = Field(
        None, gt=0, lt=1, description="decay of an average of the weights, kept in float32 beside them; null: none"
    )
    max_bad_steps: Int = Field(10, ge=1, description="non-finite steps in a row after which the run stops")


class Engine(Section):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["bf16", "float32"] = "bf16"
    zero_stage: Literal[0, 1, 2, 3] = 2
    checkpoint_activations: bool = Field(
        False, description="keep each block's input alone for the backward: less memory, a forward more"
    )


class Checkpoint(Section):
    every: Int = Field(500, ge=1)
    keep_last: Int = Field(2, ge=1)
    keep_every: Int | None = Field(None, ge=1, description="checkpoints at multiples of this step are kept for good")


class Probe(Section):
    """A small evaluation of checkpoints by a background process of the first rank, while the run goes on."""

    data: PathText = Field(..., description="labelled shards, as data.shards names them")
    index: PathText | None = Field(None, description="index file; null: beside the shards")
    classnames: PathText | None = Field(
        None, description="file, one name a line; null: classnames.txt beside the shards"
    )
    every: Int = Field(
        ..., ge=1, description="steps; a multiple of checkpoint.every. The last checkpoint is measured, too"
    )
    n_samples: Int = Field(500, ge=1, description="a fixed sample, as many of each class as can be")
    eps: Pixels | None = Field(None, gt=0, description="null: the training attack's; the norm is that one's")
    steps: Int = Field(10, ge=1, description="of PGD on cross-entropy")
    ema: bool = Field(False, description="measures the moving average that train.ema keeps")
    batch_size: Int = Field(50, ge=1)
    device: Literal["cpu", "cuda", "auto"] = Field(
        "cpu", description="cuda: the first rank's GPU, whose memory and time it then shares"
    )
    threads: Int = Field(4, ge=1, description="of the background process; at the lowest priority")
    wait_minutes: Number = Field(10.0, ge=0, description="longest wait for the last probe when the run is complete")


class Resume(Section):
    """What a run survives. How each of its starts ended stands in resume.jsonl."""

    allow: list[str] = Field([], description="dotted keys that may differ from the run's stored configuration")
    max_timeouts: Int | None = Field(
        None, ge=0, description="starts that may end because the job's time is up; null: no bound"
    )
    max_preemptions: Int | None = Field(
        None, ge=0, description="starts that may end by another signal to the job; null: no bound"
    )
    max_losses: Int | None = Field(
        5, ge=0, description="starts that may end because a rank was lost or hung; null: no bound"
    )
    max_starts_without_progress: Int = Field(3, ge=1, description="starts in a row from one and the same checkpoint")
    watchdog_minutes: Number = Field(
        10.0,
        gt=0,
        lt=30,
        description="time of a part of a step (its data, update, checkpoint) after which it counts as hung",
    )


class WandB(Section):
    """Weights & Biases; needs `pip install mmtard[wandb]`."""

    project: str
    entity: str | None = Field(None, description="user or team; null: the one you are logged in as")
    name: str | None = Field(None, description="null: the run folder's name")
    tags: list[str] = []
    mode: Literal["online", "offline", "disabled"] | None = Field(
        None, description="null: as $WANDB_MODE says, else online"
    )


class Log(Section):
    every: Int = Field(10, ge=1, description="steps between console lines; metrics.jsonl has every step")
    tensorboard: bool = True
    wandb: WandB | None = None


UNSTORABLE = "data.crop_scale and data.flip make new images each epoch, whose embeddings cannot be stored; set the number of fixed views, e.g. data.views=8"


class Config(Section):
    run_dir: PathText
    seed: Int = Field(0, ge=0, lt=2**63)
    student: Student
    teachers: dict[str, Teacher] = {}
    method: Method
    attack: Attack = Attack()
    data: Data
    train: Train
    engine: Engine = Engine()
    checkpoint: Checkpoint = Checkpoint()
    probe: Probe | None = None
    resume: Resume = Resume()
    log: Log = Log()

    @property
    def attack_objective(self) -> str | None:
        """The loss the training attack maximises; None for a method that trains on clean images."""
        return None if self.method.attack is None else self.attack.objective or self.method.attack

    @property
    def fusion(self) -> dict[str, float]:
        """Weights, of sum 1, of the teachers whose fused prediction the attack is measured against; empty for another objective."""
        if self.attack_objective != "kl_fused":
            return {}
        weights = self.attack.fusion or {name: 1.0 for name in self.teachers if name != START}
        return {name: weight / sum(weights.values()) for name, weight in weights.items()}

    @property
    def ensemble(self) -> dict[str, Teacher]:
        """The teachers of the run: those listed, and `start` from the run's own folder where a part of it needs it."""
        listed = dict(self.teachers)
        if START in self._needed:
            listed.setdefault(START, Teacher())
        stored = {"weights": str(Path(self.run_dir) / START)}
        return {
            name: t.model_copy(update=stored) if name == START and t.weights == START else t
            for name, t in listed.items()
        }

    @property
    def needs_labels(self) -> bool:
        """Whether a sample without a label in its shard is of no use to this run."""
        if self.data.targets != "labels":
            return False
        attacked = self.attack_objective is not None and ATTACK_OBJECTIVES[self.attack_objective].labels
        return self.method.labels or attacked

    @property
    def needs_classes(self) -> bool:
        """Whether the run asks any model for predictions of classes."""
        return self.method.classes or (
            self.attack_objective is not None and ATTACK_OBJECTIVES[self.attack_objective].classes
        )

    @property
    def needs_tokens(self) -> bool:
        """Whether every model of the run must give patch tokens beside its image embedding."""
        return self.method.tokens

    @property
    def _needed(self) -> set[str]:
        objective = ATTACK_OBJECTIVES[self.attack_objective].teacher if self.attack_objective else None
        return {*self.method.teachers, *self.fusion, objective} - {None}

    @model_validator(mode="after")
    def _teachers_fit(self):
        method, objective = self.method.name, self.attack.objective
        if objective is not None and self.method.attack is None:
            raise ValueError(
                f"attack.objective: method '{method}' trains on clean images and attacks none; leave it out or choose another method"
            )
        if "student" in self.teachers:
            raise ValueError(
                "teachers.student: this is what the model in training is called; give the teacher another name"
            )
        if objective is not None and objective not in ATTACK_OBJECTIVES:
            raise ValueError(
                f"attack.objective: unknown objective '{objective}'; known: {', '.join(ATTACK_OBJECTIVES)}"
            )
        needed = self._needed
        for name in sorted(needed - {START} - set(self.teachers)):
            raise ValueError(
                f"teachers.{name}: method '{method}' with attack objective '{self.attack_objective}' needs this teacher; add it"
            )
        for name in sorted(set(self.teachers) - needed):
            raise ValueError(
                f"teachers.{name}: no part of method '{method}' uses this teacher; remove it (used: {', '.join(sorted(needed)) or 'none'})"
            )
        for name, teacher in self.teachers.items():
            if name != START and teacher.weights == START:
                raise ValueError(
                    f"teachers.{name}.weights: this setting is required; only the teacher `start` is the untouched student"
                )
        if self.attack_objective == "kl_fused" and not self.fusion:
            raise ValueError("attack.objective: 'kl_fused' needs teachers to fuse; list them in attack.fusion")
        if self.attack.fusion and self.attack_objective != "kl_fused":
            raise ValueError(
                f"attack.fusion: attack objective '{self.attack_objective}' fuses no teachers; set attack.objective=kl_fused or remove it"
            )
        if self.attack.restarts > 1 and not self.attack.random_start:
            raise ValueError(
                f"attack.restarts: {self.attack.restarts} restarts without a random start are all the same; set attack.random_start=true"
            )
        return self

    @model_validator(mode="after")
    def _batches_fit(self):
        if self.data.targets == "none" and self.needs_classes:
            named = f"method '{self.method.name}'" + (
                f" with attack objective '{self.attack_objective}'" if self.attack_objective else ""
            )
            raise ValueError(
                f"data.targets: 'none' leaves no classes, which {named} needs; set it to labels or captions"
            )
        if self.data.crop_scale is not None and self.data.crop_scale[0] > self.data.crop_scale[1]:
            raise ValueError(
                f"data.crop_scale: from {self.data.crop_scale[0]:g} to {self.data.crop_scale[1]:g} is no range; write the smaller area first"
            )
        if self.data.views is not None and not self.data.augmented:
            raise ValueError(
                "data.views: without data.crop_scale or data.flip all views of a sample are the same; leave it out or set one of them"
            )
        for name, teacher in self.teachers.items():
            if teacher.stored and self.data.augmented and self.data.views is None:
                raise ValueError(f"teachers.{name}.stored: {UNSTORABLE}")
        if self.train.batch_size % self.data.lanes:
            raise ValueError(
                f"data.lanes: {self.data.lanes} lanes do not divide train.batch_size {self.train.batch_size}; make it a divisor of the batch size"
            )
        if self.probe is not None and self.probe.eps is not None and self.probe.eps >= 1 and self.attack.norm == "linf":
            raise ValueError(
                f"probe.eps: {self.probe.eps} is in units of [0,1], the whole range of a pixel; write {self.probe.eps}/255 for {self.probe.eps} of 255 levels"
            )
        if self.probe is not None and self.probe.every % self.checkpoint.every:
            raise ValueError(
                f"probe.every: {self.probe.every} is no multiple of checkpoint.every {self.checkpoint.every}; only checkpoints can be measured"
            )
        if self.probe is not None and self.probe.ema and self.train.ema is None:
            raise ValueError(
                "probe.ema: true, but the run keeps no moving average; set train.ema, or leave probe.ema out"
            )
        if self.train.warmup_steps > self.train.steps:
            raise ValueError(
                f"train.warmup_steps: {self.train.warmup_steps} is more than train.steps {self.train.steps}; lower it"
            )
        return self


def model_of(config: Config, teacher: str) -> Model:
    """The model that a teacher is: its own setting, or for the untouched student that of the student."""
    listed = config.teachers.get(teacher)
    untouched = teacher == START and (listed is None or listed.weights == START)
    return config.student if untouched else listed
