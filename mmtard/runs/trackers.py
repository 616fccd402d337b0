"""TensorBoard and Weights & Biases: where a run's numbers go besides its own files. None of them can end a run."""

from __future__ import annotations

import importlib.util
import json
import math
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

from ..config import Config, Log
from ..errors import UserError

WANDB_FILE = "wandb.json"


class Tracker(Protocol):
    """One place of record. Constructing it opens it; any of its calls may raise."""

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """The finite numbers of a finished step."""

    def log_probe(self, step: int, numbers: dict[str, float]) -> None:
        """The numbers `probe/...` of the checkpoint of `step`, which later steps may have overtaken."""

    def close(self) -> None: ...


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


def finite(row: dict[str, float | None]) -> dict[str, float]:
    """The numbers of a metrics row that can be drawn."""
    return {k: v for k, v in row.items() if k != "step" and v is not None and math.isfinite(v)}


class TensorBoard:
    """Event files in RUN/tensorboard; a step that is done again after an interruption is shown once."""

    def __init__(self, run: Path, start: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=start + 1)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    log_probe = log

    def close(self) -> None:
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
        self._run.define_metric("probe/step", hidden=True)
        self._run.define_metric("probe/*", step_metric="probe/step")
        self._newest = 0

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self._newest = step
        self._run.log(numbers, step=step)

    def log_probe(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log({**numbers, "probe/step": step}, step=max(self._newest, step))

    def close(self) -> None:
        self._run.finish()


def _identity(run: Path) -> str:
    path = run / WANDB_FILE
    if not path.is_file():
        scratch = path.with_name(path.name + ".tmp")
        scratch.write_text(json.dumps({"id": uuid.uuid4().hex[:16]}) + "\n")
        scratch.replace(path)
    return json.loads(path.read_text())["id"]
