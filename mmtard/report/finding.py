"""Where runs, models and results lie below a folder, and which weights an evaluation measured."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from ..models import lora
from ..models.clip import CONFIG_FILE, WEIGHTS_FILE
from ..models.weights import tensors_sha256
from ..runs import checkpoints
from ..runs.layout import CHECKPOINTS, EVALUATIONS, HISTORY, METRICS, MOST_ROBUST, RESULTS
from .records import Evaluation

# Folders of a run that hold no results, and may hold thousands of files.
SKIPPED = (CHECKPOINTS, "tensorboard", "wandb", "code")
MOST_FOLDERS = 5000  # of a tree that is searched: an image folder given by mistake ends it soon

TRIES = 5  # at the newest checkpoint of a run that is training and retires the one that was just looked up


@dataclass
class Found:
    """What lies below a folder; `unreadable`: (folder, why) that could not be listed; `cut`: not all was looked at."""

    runs: list[Path] = field(default_factory=list)
    results: list[Path] = field(default_factory=list)
    unreadable: list[tuple[Path, str]] = field(default_factory=list)
    cut: bool = False


def look_below(folder: Path) -> Found:
    """Find run folders and results.json files at or below a folder, by name; links to folders are not followed."""
    found = Found()

    def note(error: OSError) -> None:
        found.unreadable.append((Path(error.filename), str(error.strerror)))

    looked_at = 0
    for path, below, files in os.walk(folder, onerror=note):
        looked_at += 1
        if looked_at > MOST_FOLDERS:
            found.cut = True
            break
        below[:] = sorted(name for name in below if name not in SKIPPED and not name.startswith("."))
        if HISTORY in files or METRICS in files:
            found.runs.append(Path(path))
        if RESULTS in files:
            found.results.append(Path(path) / RESULTS)
    return found


def search_places(paths: list[Path]) -> list[Path]:
    """Where evaluations of the given runs and models may lie beside the runs themselves.

    The folder that holds a run, that of the run for its `start`, and `evaluations` here, where `mmtard evaluate` writes
    what belongs to no run.
    """
    places = []
    for path in paths:
        above = path.resolve().parent
        if (above / HISTORY).is_file() or (above / METRICS).is_file():
            above = above.parent
        places.append(above)
    here = Path.cwd()
    places = list(dict.fromkeys([*places, here / EVALUATIONS]))
    return [path.relative_to(here) if path.is_relative_to(here) else path for path in places]


def is_model_folder(path: Path) -> bool:
    """Whether open_clip loads a model from this folder."""
    return (path / CONFIG_FILE).is_file()


@dataclass(frozen=True)
class Weights:
    """The image towers of a run or a model folder by their sha256, each computed when it is first asked for.

    A tower that cannot be read or that is an adapter has no hash here: its evaluations are found by their names alone.
    """

    folder: Path

    @cached_property
    def newest(self) -> str | None:
        """The hash of a run's last checkpoint, or of the model of a model folder."""
        if is_model_folder(self.folder):
            return _image_tower_sha256(self.folder / WEIGHTS_FILE)
        for _ in range(TRIES):
            published = checkpoints.published(self.folder / CHECKPOINTS)
            if not published:
                break
            path = published[max(published)] / checkpoints.WEIGHTS
            if (found := _image_tower_sha256(path)) or path.is_file():
                return found
        return None

    @cached_property
    def most_robust(self) -> str | None:
        """The hash of the checkpoint that the probes found so."""
        path = self.folder / CHECKPOINTS / MOST_ROBUST / checkpoints.WEIGHTS
        return _image_tower_sha256(path) if path.is_file() else None

    def __contains__(self, sha256: str) -> bool:
        return sha256 in (self.newest, self.most_robust)


def measured_before(results: Path, folder: Path) -> bool:
    """Whether an evaluation that names a run or model measured other weights than the folder holds now.

    False where that cannot be said: for a checkpoint that was named itself, moving averages and adapters.
    """
    model = json.loads(results.read_bytes()).get("model", {})
    named, sha256 = Path(str(model.get("weights", ""))), model.get("sha256")
    if model.get("ema") or not sha256 or named.resolve() != folder.resolve():
        return False
    return Weights(folder).newest not in (None, sha256)


def _image_tower_sha256(path: Path) -> str | None:
    try:
        state = load_file(path)
    except (OSError, ValueError, RuntimeError, SafetensorError):  # RuntimeError: torch's, for a file that has gone
        return None
    if lora.is_adapter(state):
        return None
    tower = {name.removeprefix("visual."): value for name, value in state.items() if name.startswith("visual.")}
    return tensors_sha256(tower) if tower else None


def is_of(evaluation: Evaluation, weights: Weights) -> bool:
    """Whether an evaluation measured weights of this run or model: by their hash, or by the place that it names.

    A relative place is taken from here and from every folder above the results.
    """
    named, own = Path(evaluation.model.weights), weights.folder.resolve()
    bases = [Path.cwd(), *evaluation.path.resolve().parents]
    if any((base / named).resolve().is_relative_to(own) for base in bases):
        return True
    return evaluation.model.sha256 in weights
