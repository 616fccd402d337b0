"""What a run says of its training that an evaluation of it needs to know: its prompts and its data."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from .. import config as settings
from ..attacks.checks import health_line
from ..config import Config, Model
from ..data.class_names import templates
from ..data.dataset import Dataset
from ..data.paths import expand_shards
from ..errors import UserError
from ..files import refuse_special
from ..models.merging import merged_from
from ..runs.checkpoints import published, read_state
from ..runs.layout import CHECKPOINTS, CONFIG, START


@dataclass(frozen=True)
class TrainedWith:
    """A run's own settings and data.

    config: as the run resolved it. fingerprint: of its training data; None where it has no checkpoint that says so.
    """

    run: Path
    config: Config
    fingerprint: str | None

    def prompts(self) -> list[str] | None:
        """The prompts that named its classes; None where it was not trained on class names.

        Raises UserError where they stand in a file that is no longer there.
        """
        if self.config.data.targets != "labels" or not self.config.needs_classes:
            return None
        try:
            return templates(self.config.data)
        except UserError as error:
            raise UserError(
                f"'{self.run}': the prompts it was trained with cannot be read ({error}); name them with --templates"
            ) from None

    def line(self, dataset: Dataset) -> dict:
        """Whether the run was trained on these very samples, as a health line."""
        here = {os.path.abspath(path) for path in dataset.paths}
        shared = len(here & self._shards())
        if self.fingerprint == dataset.fingerprint:
            detail = f"these are the samples that '{self.run}' was trained on: the accuracy says little of other images"
        else:
            detail = f"{shared} of {len(here)} shards are among those that '{self.run}' was trained on"
        return health_line("not the training data", self.fingerprint != dataset.fingerprint and not shared, detail)

    def _shards(self) -> set[str]:
        try:
            return {os.path.abspath(path) for path in expand_shards(self.config.data.shards)}
        except UserError:
            return set()  # they are no longer there; the fingerprint still tells


def trained_with(spec: Model) -> TrainedWith | None:
    """What the run of a model says; None for a model that is no run, checkpoint, or start of a run.

    Of a model that `mmtard merge` made, what the run says that it was made of.
    """
    return _trained_with(Path(spec.weights), set())


def _trained_with(path: Path, seen: set[str]) -> TrainedWith | None:
    """seen: the folders that were looked at, since the notes of merges may name one another in a circle."""
    here = os.path.realpath(path)
    if here in seen:
        return None
    seen.add(here)
    candidates = [path, path.resolve()] if path.is_dir() else []
    for folder in candidates:
        run = folder.parent if folder.name == START else folder
        run = folder.parent.parent if folder.parent.name == CHECKPOINTS else run
        if (run / CONFIG).is_file() and ((run / CHECKPOINTS).is_dir() or (run / START).is_dir()):
            refuse_special(run)
            return TrainedWith(run, settings.load(run / CONFIG), _fingerprint(run))
    parts = (_trained_with(part, seen) for part in merged_from(path))
    return next((found for found in parts if found is not None), None)


def _fingerprint(run: Path) -> str | None:
    for _, checkpoint in sorted(published(run / CHECKPOINTS).items(), reverse=True):
        try:
            return read_state(checkpoint).get("data_fingerprint")
        except (OSError, ValueError, AttributeError):
            continue  # damaged, or just removed: an older one says the same
    return None
