"""What a report is made of: the files of runs, and evaluations of models that are not runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .. import history
from ..errors import UserError
from ..metrics import EVENTS, METRICS
from .records import Evaluation, read as read_results

PROBES, CONFIG, ENVIRONMENT, RESULTS = "probes.jsonl", "config.yaml", "environment.json", "results.json"


@dataclass
class Source:
    """A run or a model: what was found of it, and in `missing` what was not, in words."""

    name: str
    path: Path
    config: str | None = None  # YAML, as it stands in the run's folder
    environment: dict | None = None
    starts: list[dict] = field(default_factory=list)
    metrics: list[dict] = field(default_factory=list)
    probes: list[dict] = field(default_factory=list)
    events: list[dict] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)  # oldest first
    missing: list[str] = field(default_factory=list)

    @property
    def is_run(self) -> bool:
        return self.config is not None or bool(self.starts)


def read(paths: list[Path]) -> list[Source]:
    """The sources in the order given, each with a name of its own. Raises UserError for a path that is neither run nor results."""
    found = [source for path in paths for source in _read(path)]
    for i, source in enumerate(found):
        others = [s.name for s in found[:i]]
        if source.name in others:
            source.name = next(name for name in _longer_names(source) if name not in others)
    return found


def _longer_names(source: Source) -> Iterator[str]:
    parts = source.path.resolve().parts
    yield from ("/".join(parts[-n:]) for n in range(2, len(parts) + 1))
    n = 2
    while True:
        yield f"{source.name} ({n})"
        n += 1


def _read(path: Path) -> list[Source]:
    if not path.exists():
        raise UserError(f"'{path}' does not exist; give a run's folder, or a results.json or its folder")
    if path.is_file():
        evaluation = read_results(path)
        return [Source(_stem(path), path, evaluations=[evaluation], missing=["training: these are evaluation results alone"])]
    if any((path / name).is_file() for name in (CONFIG, METRICS, history.FILE)):
        return [read_run(path)]
    evaluations, damaged = _evaluations(path)
    if not evaluations:
        why = f" ({damaged[0]})" if damaged else ""
        raise UserError(f"'{path}' is neither a run's folder nor holds a {RESULTS}{why}; run `mmtard evaluate` first, or correct the path")
    by_model: dict[str, list[Evaluation]] = {}
    for evaluation in evaluations:
        by_model.setdefault(evaluation.model.sha256, []).append(evaluation)
    return [
        Source(
            path.resolve().name if len(by_model) == 1 else Path(of_one[0].model.weights).name,
            path,
            evaluations=of_one,
            missing=["training: these are evaluation results alone", *damaged],
        )
        for of_one in by_model.values()
    ]


def _stem(path: Path) -> str:
    return path.resolve().parent.name if path.name == RESULTS else path.stem


def read_run(path: Path) -> Source:
    """What a run's folder holds."""
    source = Source(path.resolve().name, path, starts=history.read(path))
    source.metrics, source.probes, source.events = (rows_of(path / name) for name in (METRICS, PROBES, EVENTS))
    source.evaluations, damaged = _evaluations(path / "evaluations")
    source.missing += damaged
    if (path / CONFIG).is_file():
        source.config = (path / CONFIG).read_text(encoding="utf-8")
    try:
        source.environment = json.loads((path / ENVIRONMENT).read_text())
    except (OSError, ValueError):
        source.missing.append(f"versions, hosts and the command: no readable {ENVIRONMENT}")
    for what, name, have in (
        ("training curves", METRICS, source.metrics),
        ("clean and robust accuracy during training", PROBES, source.probes),
        ("configuration", CONFIG, source.config),
        ("history of starts", history.FILE, source.starts),
        ("accuracy under attack", f"evaluations/**/{RESULTS}", source.evaluations),
    ):
        if not have:
            source.missing.append(f"{what}: no {name}")
    return source


def _evaluations(folder: Path) -> tuple[list[Evaluation], list[str]]:
    """(the evaluations below a folder, oldest first, and why others cannot be shown)."""
    found, damaged = [], []
    for path in sorted(folder.rglob(RESULTS), key=lambda p: (p.stat().st_mtime, str(p))):
        try:
            found.append(read_results(path))
        except UserError as error:
            damaged.append(f"an evaluation: {error}")
    return found, damaged


def rows_of(path: Path) -> list[dict]:
    """The rows of a JSONL file; none where it is missing. A line that an interruption cut short is left out."""
    rows = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows
