"""The evaluations of runs that measured the same, found where `mmtard evaluate` put them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..files import settings_digest
from ..runs.layout import CHECKPOINTS, EVALUATIONS, RESULTS
from ..runs.manifest import newest
from .results import damage_named, read

# What may differ between two evaluations that measure the same: how fast, and what else was checked.
FREE = ("batch_size", "sanity", "independent_radii", "compile")
DECIDES = ("kind", "fingerprint", "classes", "templates", "perturb_at", "perturbed_size", "left_out")
DEPTH = 4  # folders below the one that holds a run, in which an evaluation of it is looked for


@dataclass(frozen=True)
class Measured:
    """A zero-shot dataset of an evaluation. `of_run`: the run itself was measured, rather than a checkpoint by name."""

    path: Path
    settings: dict
    entry: dict
    of_run: bool = True

    @property
    def way(self) -> str:
        """What two evaluations have in common that may be compared sample by sample."""
        entry, samples = self.entry, self.entry["samples"]
        return settings_digest(
            {
                "settings": {k: v for k, v in deciding_settings(self.settings).items() if k not in FREE},
                "name": entry["name"],
                **{key: entry.get(key) for key in DECIDES},
                "eps": list(entry["eps"]),
                "samples": [samples.get("ids"), samples.get("labels")],
            }
        )


def deciding_settings(settings: dict) -> dict:
    """The settings without where the other model's weights came from; its `transfer_from` is None without one."""
    other = settings.get("transfer_from")
    return settings | {"transfer_from": other and {k: v for k, v in other.items() if k != "weights"}}


def is_results(path: Path) -> bool:
    """Whether a path names one evaluation, rather than a run whose evaluations are to be found."""
    return path.is_file() or (path / RESULTS).exists() or not path.is_dir()


def measured_of(path: Path, beside: Path | None = None) -> dict[str, Measured]:
    """way -> the evaluation of a run, or of one results.json.

    Of several that measured the same, the run's own comes before a checkpoint's, and the newest before the others.
    beside: what it is compared with; an evaluation that this names is not taken for the run's as well. Raises UserError
    where there is none that can be read.
    """
    if is_results(path):
        found, unreadable = [(path, read(path), True)], []
    else:
        found, unreadable = _of_run(path)
        other = file_of(beside) if beside is not None and is_results(beside) else None
        found = [one for one in found if one[0].resolve() != other]
    if not found:
        told = f" ({'; '.join(unreadable)})" if unreadable else ""
        raise UserError(
            f"'{path}' has no evaluation that can be compared{told}; run `mmtard evaluate {path} --data ROOT`, "
            f"or name the folder of its {RESULTS}"
        )
    found.sort(key=lambda one: (one[2], _age(one[0])))  # later ones take the place of earlier ones
    ways, damaged = {}, None
    for file, results, of_run in found:
        try:
            with damage_named(file):
                entries = [d for d in results["datasets"] if d["kind"] == "zeroshot"]
                measured = [Measured(file, results["settings"], entry, of_run) for entry in entries]
                ways |= {one.way: one for one in measured}
        except UserError as error:
            damaged = error
    if damaged is not None and not ways:
        raise damaged
    return ways


def file_of(results: Path) -> Path:
    """The results.json that a path names: the file itself, or that of a folder."""
    return (results / RESULTS if results.is_dir() else results).resolve()


def _of_run(run: Path) -> tuple[list[tuple[Path, dict, bool]], list[str]]:
    """(file, results, whether the run itself was measured) of each evaluation of a run; what is wrong with others."""
    found, unreadable = [], []
    its_own = {run.resolve(), (newest(run)[0] or run).resolve()}  # a study names the checkpoint of the last step
    for file in dict.fromkeys([*sorted(run.rglob(RESULTS)), *_beside(run)]):
        try:
            results = read(file)
            with damage_named(file):
                weights = Path(str(results.get("model", {}).get("weights", "")))
                own = run in file.parents and file.relative_to(run).parts[0] == EVALUATIONS
                if own or _lies_in(weights, run):
                    found.append((file, results, weights.resolve() in its_own))
        except UserError as error:
            if run in file.parents:
                unreadable.append(str(error).partition(";")[0])
    return found, unreadable


def _beside(run: Path) -> Iterator[Path]:
    """The results.json beside the run and in evaluations/ here, where --out may have put them; none of another run."""
    for top in (run.resolve().parent, Path(EVALUATIONS)):
        for depth in range(1, DEPTH + 1):
            for file in sorted(top.glob("/".join(["*"] * depth) + f"/{RESULTS}")):
                if not any((folder / CHECKPOINTS).is_dir() for folder in file.parents):
                    yield file


def _lies_in(weights: Path, run: Path) -> bool:
    """Whether weights are the run's: the folder itself, or one of its checkpoints. Its start is another model."""
    inner = run.resolve()
    return weights.resolve() == inner or (inner / CHECKPOINTS) in weights.resolve().parents


def _age(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0
