"""The student of a run: the start that is stored with it, and the tower that is trained, as the `student` section wants it."""

from __future__ import annotations

from pathlib import Path

from . import batch_norm, lora, towers
from .checkpoint import read_weights
from .config import Config, Model
from .parallel import Ranks
from .towers import Clip, ImageTower


def start(config: Config, run: Path, resumed: bool, ranks: Ranks) -> Clip:
    """The pretrained model a run starts from, read from the run's own folder.

    A new run writes it there, so that it can be evaluated, exported and resumed without its source. Collective.
    """
    folder = run / towers.START_FOLDER
    if config.student.lora:
        lora.require()
    if not resumed:
        clip = towers.load(config.student, config.seed, "student")
        ranks.from_first(lambda: clip.save(folder))
    return towers.load(Model(weights=str(folder)))


def tower(config: Config, clip: Clip, checkpoint: Path | None) -> ImageTower:
    """The tower to be trained, with the weights of a checkpoint folder where there is one; what is frozen needs no grad."""
    made = clip.tower()
    if config.student.lora:
        lora.attach(made.visual, config.student.lora, made.views, config.seed)
    if config.student.batch_norm == "synced":
        batch_norm.synchronise(made.visual, made.views)
        made.frozen_batch_norm = False
    if checkpoint:
        towers.load_trained(made, read_weights(checkpoint), f"checkpoint '{checkpoint}'")
    return made
