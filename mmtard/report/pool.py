"""Evaluations that lie outside of the runs, which a run or a model takes by the hash of its weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from ..errors import UserError
from . import finding
from .records import Evaluation, read as read_results
from .run_files import is_run_folder


class Pool:
    """The evaluations that lie outside of the runs, each read once; a run or model takes those of its own weights."""

    def __init__(self, paths: list[Path]):
        given = [path for path in paths if is_run_folder(path) or finding.is_model_folder(path)]
        folders = [path for path in paths if path.is_dir() and path not in given]
        self._beside = [path for path in finding.search_places(given) if path.is_dir()] if given else []
        self.below = {path: finding.look_below(path) for path in (*folders, *self._beside)}
        self._runs = [run.resolve() for run in (*given, *(run for path in folders for run in self.below[path].runs))]
        self._read: dict[Path, Evaluation | UserError] = {}
        self._taken: set[Path] = set()

    def read(self, path: Path) -> Evaluation:
        """Raises UserError, each time, for a file that is no results.json."""
        key = path.resolve()
        if key not in self._read:
            try:
                self._read[key] = read_results(path)
            except UserError as error:
                self._read[key] = error
        if isinstance(known := self._read[key], UserError):
            raise known
        return known

    def take(
        self, paths: list[Path], wanted: Callable[[Evaluation], bool] | None = None
    ) -> tuple[list[Evaluation], list[str]]:
        """(those of the files that nobody took and `wanted` accepts, oldest first, why others cannot be shown)."""
        evaluations, damaged = [], []
        for path in sorted(paths, key=lambda path: (age(path), str(path))):
            if path.resolve() in self._taken:
                continue
            try:
                evaluation = self.read(path)
            except UserError as error:
                self._taken.add(path.resolve())
                damaged.append(f"an evaluation: {error}")
                continue
            if wanted is None or wanted(evaluation):
                self._taken.add(path.resolve())
                evaluations.append(evaluation)
        return evaluations, damaged

    def of(self, weights: finding.Weights) -> list[Evaluation]:
        """Take the evaluations of a run's or model's weights that lie outside of every run, oldest first."""
        return self.take(self._outside, lambda evaluation: finding.is_of(evaluation, weights))[0]

    @cached_property
    def _outside(self) -> list[Path]:
        """What can be read; a damaged file is told where its folder was given, and else not the report's to tell."""
        paths = {path.resolve(): path for found in self.below.values() for path in found.results}
        outside = [p for real, p in paths.items() if not any(real.is_relative_to(run) for run in self._runs)]
        return [path for path in outside if self._readable(path)]

    def _readable(self, path: Path) -> bool:
        try:
            return bool(self.read(path))
        except UserError:
            return False


def age(path: Path) -> float:
    """Return when a file was last changed; 0 where that cannot be known."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
