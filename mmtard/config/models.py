"""Settings of the models of a run: the student, the teachers, and low-rank adapters."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .method_settings import START
from .values import Int, Number, PathText, Section


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
    """The model that is trained."""

    lora: Lora | None = Field(None, description="train adapters alone; null: the whole tower")
    batch_norm: Literal["frozen", "synced"] = Field(
        "frozen", description="a ResNet's statistics: the pretrained ones, or each step's over all ranks"
    )


class Teacher(Model):
    """A frozen model that the student learns from."""

    weights: PathText = Field(
        START, description="as a student's; only the teacher `start` may leave it out: it is then the untouched student"
    )
    placement: Literal["replicated", "sharded"] = Field(
        "replicated", description="whole on every GPU, or in parts over the GPUs, gathered block by block"
    )
    stored: bool = Field(
        False,
        description="read its embeddings, which `mmtard cache` stored, instead of running it; "
        "for a teacher that sees clean images alone",
    )
