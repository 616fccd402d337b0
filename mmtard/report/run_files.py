"""What one run folder holds for the report: configuration, versions, starts, metrics, probes, events."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError
from ..files import read_json_lines
from ..runs import history
from ..runs.layout import CONFIG, ENVIRONMENT, EVENTS, HISTORY, METRICS, PROBES
from ..runs.probes import differences
from .records import Evaluation

LARGEST_STEP = 2**53


@dataclass
class ReportSource:
    """A run or a model: what was found of it, in `missing` what was not, in `problem` why nothing of it can be read."""

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
    problem: str = ""

    @property
    def is_run(self) -> bool:
        """Whether a run's files were found, not evaluations alone."""
        return self.config is not None or bool(self.starts)


def is_run_folder(path: Path) -> bool:
    """Whether a run left its files in this folder."""
    return any((path / name).is_file() for name in (CONFIG, METRICS, HISTORY))


def read_run(path: Path) -> ReportSource:
    """Read what a run's folder holds, but for its evaluations. What is missing or damaged is said in `missing`."""
    source = ReportSource(path.resolve().name, path)
    rows = {name: _rows(source, name) for name in (METRICS, PROBES, EVENTS)}
    source.metrics, source.events = rows[METRICS], rows[EVENTS]
    source.probes = _probes(source, rows[PROBES])
    source.starts = _starts(source)
    if (path / CONFIG).is_file():
        source.config = (path / CONFIG).read_text(encoding="utf-8", errors="replace")
    source.environment = _environment(path)
    if source.environment is None:
        source.missing.append(f"versions, hosts and the command: no readable {ENVIRONMENT}")
    for what, name, have in (
        ("training curves", METRICS, source.metrics),
        ("clean and robust accuracy during training", PROBES, source.probes),
        ("configuration", CONFIG, source.config),
        ("history of starts", HISTORY, source.starts),
    ):
        if not have:
            source.missing.append(f"{what}: no {name}")
    return source


def _probes(source: ReportSource, rows: list[dict]) -> list[dict]:
    """In the order of their steps, those that measured as the last one did; others are counted in `missing`.

    After other settings, or data that were rewritten, a step is measured again.
    """
    good = [row for row in rows if isinstance(row.get("n"), int) and row["n"] > 0 and _shares(row)]
    alike = [row for row in good if not differences([_protocol(row)], _protocol(good[-1]))]
    if len(alike) < len(good):
        told = f"{len(good) - len(alike)} of {len(good)} were measured otherwise than the last, or on other data"
        source.missing.append(f"{PROBES}: {told}, and are not shown")
    return sorted(alike, key=lambda row: row["step"])


def _rows(source: ReportSource, name: str) -> list[dict]:
    """The rows of a file of JSON lines that name a step; other rows are counted in `missing`."""
    try:
        rows = read_json_lines(source.path / name)
    except (OSError, ValueError, RecursionError) as error:
        source.missing.append(f"{name}: cannot be read ({error})")
        return []
    good = [row for row in rows if isinstance(row.get("step"), int) and 0 <= row["step"] <= LARGEST_STEP]
    if len(good) < len(rows):
        source.missing.append(f"{name}: {len(rows) - len(good)} of {len(rows)} rows name no step")
    return good


def _shares(row: dict) -> bool:
    """Whether a probe's accuracies are shares, so far as they are numbers."""
    values = [row.get(kind) for kind in ("clean", "robust")]
    return all(not isinstance(value, int | float) or 0 <= value <= 1 for value in values)


def _protocol(row: dict) -> dict:
    """How a probe was measured, as far as its row says."""
    protocol = row.get("protocol")
    return protocol if isinstance(protocol, dict) else {}


def _starts(source: ReportSource) -> list[dict]:
    try:
        starts = history.read(source.path)
    except (UserError, OSError, ValueError, RecursionError) as error:
        source.missing.append(f"history of starts: {error}")
        return []
    return [start for start in starts if isinstance(start, dict) and _well_formed(start.get("end"))]


def _well_formed(end: object) -> bool:
    return not end or (isinstance(end, dict) and all(isinstance(end.get(key), str) for key in ("kind", "reason")))


def _environment(path: Path) -> dict | None:
    try:
        found = json.loads((path / ENVIRONMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
