"""What a report is made of: the files of runs, and evaluations of models that are not runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError
from ..runs import history
from ..runs.layout import EVENTS, HISTORY, METRICS
from .records import About, Evaluation, read as read_results

PROBES, CONFIG, ENVIRONMENT, RESULTS = "probes.jsonl", "config.yaml", "environment.json", "results.json"


@dataclass
class ReportSource:
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


def read(paths: list[Path]) -> list[ReportSource]:
    """The sources in the order given, each with a name of its own. Raises UserError for a path that is neither run nor results."""
    found = [source for path in paths for source in _read(path)]
    for i, source in enumerate(found):
        others = [s.name for s in found[:i]]
        if source.name in others:
            source.name = next(name for name in _longer_names(source) if name not in others)
    return found


def _longer_names(source: ReportSource) -> Iterator[str]:
    above = (source.path.parent if source.path.name == RESULTS else source.path).resolve().parts[:-1]
    yield from ("/".join((*above[-n:], source.name)) for n in range(1, len(above) + 1))
    n = 2
    while True:
        yield f"{source.name} ({n})"
        n += 1


def _read(path: Path) -> list[ReportSource]:
    if not path.exists():
        raise UserError(f"'{path}' does not exist; give a run's folder, or a results.json or its folder")
    if path.is_file():
        evaluation = read_results(path)
        return [
            ReportSource(
                _stem(path), path, evaluations=[evaluation], missing=["training: these are evaluation results alone"]
            )
        ]
    if any((path / name).is_file() for name in (CONFIG, METRICS, HISTORY)):
        return _columns(read_run(path))
    evaluations, damaged = _evaluations(path)
    if not evaluations:
        why = f" ({damaged[0]})" if damaged else ""
        raise UserError(
            f"'{path}' is neither a run's folder nor holds a {RESULTS}{why}; run `mmtard evaluate` first, or correct the path"
        )
    by_model = _by_model(evaluations)
    names = _names(path, by_model) if len(by_model) > 1 else dict.fromkeys(by_model, path.resolve().name)
    missing = ["training: these are evaluation results alone", *damaged]
    return [
        ReportSource(names[model], path, evaluations=of_one, missing=list(missing))
        for model, of_one in by_model.items()
    ]


def _columns(run: ReportSource) -> list[ReportSource]:
    """The run with the evaluations of its own weights, the newest that were measured under its name; a source for each of the others."""
    own = next((e.model.identity for e in reversed(run.evaluations) if _name(e.model, run.path) == run.name), None)
    by_model = _by_model(run.evaluations)
    names = _names(run.path, by_model, {own: run.name})
    run.evaluations = by_model.pop(own, [])
    if by_model and not run.evaluations:
        run.missing.append(
            "accuracy under attack: no evaluation of its newest weights; those of others have columns of their own"
        )
    missing = f"training: these are other weights than the newest of the run '{run.path}'"
    return [
        run,
        *(
            ReportSource(names[model], run.path, evaluations=of_one, missing=[missing])
            for model, of_one in by_model.items()
        ),
    ]


def _by_model(evaluations: list[Evaluation]) -> dict[tuple, list[Evaluation]]:
    """The evaluations of each model by its identity; in each, and by each one's first, oldest first."""
    found: dict[tuple, list[Evaluation]] = {}
    for evaluation in evaluations:
        found.setdefault(evaluation.model.identity, []).append(evaluation)
    return found


def _names(
    folder: Path, by_model: dict[tuple, list[Evaluation]], given: dict[tuple | None, str] | None = None
) -> dict[tuple | None, str]:
    """A name for each model, beside those given: of its newest evaluation, where a newer model has that name with the hash of its weights."""
    names = dict(given or {})
    for model, of_one in reversed(by_model.items()):
        name = _name(of_one[-1].model, folder)
        names.setdefault(model, name if name not in names.values() else f"{name} {of_one[-1].model.sha256[:8]}")
    return names


def _name(model: About, folder: Path) -> str:
    """`b32`, `b32 most_robust` or `b32 ema`, as the weights were given; the folder's own name for weights given as `.`."""
    path = Path(model.weights)
    of, checkpoint = (path.parent.parent, [path.name]) if path.parent.name == "checkpoints" else (path, [])
    return " ".join([of.name or folder.resolve().name, *checkpoint, *(["ema"] if model.ema else [])])


def _stem(path: Path) -> str:
    return path.resolve().parent.name if path.name == RESULTS else path.stem


def read_run(path: Path) -> ReportSource:
    """What a run's folder holds."""
    source = ReportSource(path.resolve().name, path, starts=history.read(path))
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
        ("history of starts", HISTORY, source.starts),
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
