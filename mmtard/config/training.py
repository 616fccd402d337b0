"""Settings of the loop: optimisation, engine, checkpoints, probe, restarts, logs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from .values import Int, Number, PathText, Pixels, Section


def _switch(value: Any) -> Any:
    """`on` and `off`, which YAML takes for true and false, as the words that they are."""
    return ("off", "on")[value] if isinstance(value, bool) else value


Decay = Annotated[Number, Field(ge=0, lt=1)]


class Train(Section):
    """Optimisation with AdamW: linear warm-up, then a cosine to zero, or one cycle of the learning rate."""

    steps: Int = Field(..., ge=1, description="updates of the whole run")
    batch_size: Int = Field(..., ge=1, description="samples of an update, over all ranks")
    micro_batch_size: Int | None = Field(
        None, ge=1, description="most samples a rank takes at once; null: all of its share"
    )
    lr: Number = Field(2e-5, gt=0, description="largest learning rate, which the warm-up reaches")
    schedule: Literal["cosine", "onecycle"] = Field(
        "cosine",
        description="of the learning rate. cosine: linear warm-up, then a cosine to 0; onecycle: from lr / 25 up to lr "
        "and down to almost 0, each in half a cosine, as torch's OneCycleLR",
    )
    warmup_steps: Int = Field(
        0,
        ge=0,
        description="steps of the linear warm-up, at most train.steps; onecycle: the step with the largest rate, 0 for "
        "three tenths of the run",
    )
    weight_decay: Number = Field(1e-4, ge=0, description="AdamW's, on weight matrices alone")
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="AdamW's decays of the first and the second moment")
    grad_clip: Number | None = Field(None, gt=0, description="largest global gradient norm; null: no clipping")
    ema: Number | None = Field(
        None, gt=0, lt=1, description="decay of an average of the weights, kept in float32 beside them; null: none"
    )
    max_bad_steps: Int = Field(10, ge=1, description="non-finite steps in a row after which the run stops")


class Engine(Section):
    """Where and in which precision the run computes."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU where there is one, else the CPU")
    precision: Literal["bf16", "float32"] = Field(
        "bf16",
        description="of the forwards; weights and moments are float32. "
        "A CPU without bf16 instructions is faster in float32",
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        2, description="DeepSpeed ZeRO: 1 shares the moments over the ranks, 2 the gradients too, 3 the weights too"
    )
    deterministic: bool = Field(
        False,
        description="GPUs: deterministic kernels, so that equal runs on the same GPUs and world size give "
        "the same bits; slower. A CPU run always does",
    )
    checkpoint_activations: bool = Field(
        False, description="keep each block's input alone for the backward: less memory, a forward more"
    )
    checkpoint_attack: bool = Field(
        False, description="with checkpoint_activations: in the attack, too, which takes half as long again"
    )
    compile: Annotated[Literal["auto", "on", "off", "graphs"], BeforeValidator(_switch)] = Field(
        "auto",
        description="compile the forwards of student, attack and teachers by torch.compile; auto: on GPUs. graphs: on, "
        "and the attack as CUDA graphs, for some 32 images a GPU or fewer",
    )
    attack_copy: bool = Field(
        True,
        description="keep a copy of the student without gradients for the attack: in bf16 it is cast, and under "
        "zero_stage 3 gathered, once an update instead of at every pass; `mmtard config --memory` says what it takes",
    )


class Checkpoint(Section):
    """When the run's state is saved, and which states are kept."""

    every: Int = Field(500, ge=1, description="steps from one checkpoint to the next")
    keep_last: Int = Field(2, ge=1, description="newest checkpoints that are kept")
    keep_every: Int | None = Field(
        None, ge=1, description="checkpoints at multiples of this step are kept for good; null: none"
    )


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
    batch_size: Int = Field(50, ge=1, description="images that the probe takes at once")
    device: Literal["cpu", "cuda", "auto"] = Field(
        "cpu", description="cuda: the first rank's GPU, whose memory and time it then shares"
    )
    threads: Int = Field(4, ge=1, le=4096, description="of the background process; at the lowest priority")
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
    max_starts_without_progress: Int = Field(
        3, ge=1, description="starts in a row from one and the same checkpoint, or that a signal ended as ranks started"
    )
    watchdog_minutes: Number = Field(
        10.0,
        gt=0,
        lt=30,
        description="time of a part of a step (its data, update, checkpoint) after which it counts as hung; "
        "ranks wait so long for one that has not come (started without srun or torchrun: a fifth of it)",
    )


class WandB(Section):
    """Weights & Biases; needs `pip install mmtard[wandb]`."""

    project: str = Field(..., description="the project that the run is shown in")
    entity: str | None = Field(None, description="user or team; null: the one you are logged in as")
    name: str | None = Field(None, description="null: the run folder's name")
    tags: list[str] = Field([], description="words to find the run by")
    mode: Literal["online", "offline", "disabled"] | None = Field(
        None, description="null: as $WANDB_MODE says, else online"
    )


class Log(Section):
    """What is shown while the run goes on."""

    every: Int = Field(10, ge=1, description="steps between console lines; metrics.jsonl has every step")
    tensorboard: bool = Field(True, description="write TensorBoard's event files into the run folder")
    wandb: WandB | None = Field(None, description="also show the run at Weights & Biases; null: do not")
