"""TensorBoard and Weights & Biases: where a run's numbers go besides its own files. None of them can end a run."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

from ..config import Config, Log
from ..errors import UserError
from ..files import write_text
from .layout import TENSORBOARD, WANDB

# The group of a column, by which a tracker sorts its curves; what stands in none of them is a term of the loss.
GROUPS = {
    "acc_clean": "train_accuracy",
    "acc_adv": "train_accuracy",
    "lr": "optimizer",
    "grad_norm": "optimizer",
    "skipped": "counts",
    "replaced": "counts",
    "seconds": "speed",
    "images_per_s": "speed",
    "tflops_a_rank": "speed",
    "mfu": "speed",
    "memory_gib": "speed",
    "reserved_gib": "speed",
}
NO_CURVES = ("step", "batch")  # `batch` is a digest of the samples


class Tracker(Protocol):
    """One place of record. Constructing it opens it; any of its calls may raise."""

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Take the finite numbers of a finished step, by tag."""

    def log_probe(self, step: int, numbers: dict[str, float]) -> None:
        """Take the numbers `accuracy/...` of the checkpoint of `step`, which later steps may have overtaken."""

    def close(self) -> None:
        """Bring all numbers to their place."""


def check(log: Log) -> None:
    """UserError when a tracker that the settings ask for is not installed. Imports none of them."""
    if log.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise UserError(
            "log.wandb: the package wandb is not installed; pip install mmtard[wandb], or set log.wandb=null"
        )


def chosen(config: Config, start: int) -> dict[str, Callable[[], Tracker]]:
    """What opens each tracker of the settings, by name, for a run that goes on from step `start`."""
    run = Path(config.run_dir)
    board = {"TensorBoard": partial(TensorBoard, run, start)} if config.log.tensorboard else {}
    return board | ({"Weights & Biases": partial(WandB, config, run)} if config.log.wandb else {})


def curves(row: dict[str, float | None]) -> dict[str, float]:
    """The finite numbers of a metrics row by the tag of their curve: `loss/kl_clean`, `weight/clean`, `speed/mfu`."""
    numbers = {k: v for k, v in row.items() if k not in NO_CURVES and v is not None and math.isfinite(v)}
    return {_tag(name): value for name, value in numbers.items()}


def _tag(column: str) -> str:
    if column == "loss":
        return "loss/total"
    if column in GROUPS:
        return f"{GROUPS[column]}/{column}"
    return f"weight/{column.removeprefix('w_')}" if column.startswith("w_") else f"loss/{column}"


class TensorBoard:
    """Event files in RUN/tensorboard; a step that is done again after an interruption is shown once."""

    def __init__(self, run: Path, start: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / TENSORBOARD), purge_step=start + 1)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Add the numbers of a step, each to the curve of its tag."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    log_probe = log

    def close(self) -> None:
        """Write what is pending."""
        self._writer.close()


class WandB:
    """A W&B run under an id that RUN/wandb.json keeps, so that every start of the run goes on in the same one."""

    def __init__(self, config: Config, run: Path):
        import wandb

        settings, identity = config.log.wandb, _identity(run)
        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            name=settings.name or run.name,
            tags=settings.tags,
            mode=settings.mode,
            id=identity,
            resume="allow",
            dir=str(run),
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(console="off", init_timeout=60, finish_timeout=30),
        )
        # W&B's own step only grows; a probe's numbers belong to a step that is over.
        self._run.define_metric("accuracy/step", hidden=True)
        self._run.define_metric("accuracy/*", step_metric="accuracy/step")
        self._newest = 0

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Send the numbers of a step."""
        self._newest = step
        self._run.log(numbers, step=step)

    def log_probe(self, step: int, numbers: dict[str, float]) -> None:
        """Send the accuracies of a checkpoint, which belong to `step` though later steps were sent already."""
        self._run.log({**numbers, "accuracy/step": step}, step=max(self._newest, step))

    def close(self) -> None:
        """Send what is pending and end the run's session."""
        self._run.finish()


def _identity(run: Path) -> str:
    """The id that the run has at W&B, made at its first start. A damaged file is made anew."""
    try:
        known = json.loads((run / WANDB).read_bytes())["id"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        known = ""
    if not isinstance(known, str) or not re.fullmatch(r"[\w-]{1,64}", known):
        known = uuid.uuid4().hex[:16]
        write_text(run / WANDB, json.dumps({"id": known}) + "\n")
    return known
