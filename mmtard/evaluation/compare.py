"""Models on the same samples: paired differences from the first with McNemar's test, and means over seeds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from ..errors import UserError
from .matching import DECIDES, FREE, Measured, deciding_settings, is_results, measured_of
from .results import damage_named, read
from .statistics import paired_difference


@dataclass(frozen=True)
class Row:
    """One model's accuracy on a dataset at one eps (None: clean), and how it differs from the first model's."""

    dataset: str
    eps: str | None
    against: Path  # the first model's results that it is compared with: they tell evaluations of one dataset apart
    label: str
    accuracy: float
    n: int
    path: Path
    named: Path  # the run, or the evaluation, that was named for it
    difference: dict | None = None  # as `paired_difference` gives it; None for the first model itself

    @property
    def column(self) -> tuple[str, str | None, Path]:
        """What it has in common with the rows that it may be averaged with."""
        return self.dataset, self.eps, self.against


@dataclass(frozen=True)
class Mean:
    """The mean over the runs of one label, and the standard deviation of single runs (0 for one)."""

    dataset: str
    eps: str | None
    against: Path
    label: str
    runs: int
    accuracy: float
    deviation: float


def compare_all(paths: list[Path], labels: list[str] | None = None) -> list[Row]:
    """The rows of any number of runs or evaluations, each against the first; the rows of one dataset and eps together.

    labels: a name for each; default: the folders' names. Runs of one label are seeds of one thing (`means`). Raises
    UserError for fewer than two, labels of another number, and a pair that measured nothing alike.
    """
    if len(paths) < 2:
        raise UserError("compare: needs two or more runs or evaluations; name them one after the other")
    if labels is not None and len(labels) != len(paths):
        raise UserError(f"--labels: {len(labels)} labels for {len(paths)} runs; give one each, in their order")
    labels = labels or distinct_names(paths)
    first_rows: dict[tuple, Row] = {}
    others: dict[tuple, list[Row]] = {}
    for label, path in zip(labels[1:], paths[1:]):
        for first, second in _pairs(paths[0], path):
            for row in _paired(first, second):
                at, n = (row["dataset"], row["eps"], first.path), row["n"]
                first_rows.setdefault(at, Row(*at, labels[0], row["a"], n, first.path, paths[0]))
                others.setdefault(at, []).append(Row(*at, label, row["b"], n, second.path, path, row))
    return [row for at, first in first_rows.items() for row in (first, *others[at])]


def means(rows: list[Row]) -> list[Mean]:
    """The means over the runs of each label, for each dataset, eps and evaluation; [] where no label has several."""
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        groups.setdefault((*row.column, row.label), []).append(row.accuracy)
    if all(len(found) == 1 for found in groups.values()):
        return []
    return [Mean(*at, len(a), mean(a), stdev(a) if len(a) > 1 else 0.0) for at, a in groups.items()]


def distinct_names(paths: list[Path]) -> list[str]:
    """The last part of each path in which any of them differ."""
    parts = [path.resolve().parts for path in paths]
    for end in range(1, min(map(len, parts)) + 1):
        names = ["/".join(p[-end:]) for p in parts]
        if len(set(names)) == len(set(map(str, parts))):
            return names
    return [str(path) for path in paths]


def _pairs(a: Path, b: Path) -> list[tuple[Measured, Measured]]:
    """What two runs, or two evaluations, measured alike. Raises UserError where that is nothing."""
    if is_results(a) and is_results(b):
        return _strict_pairs(a, b)
    ours, theirs = measured_of(a, beside=b), measured_of(b, beside=a)
    pairs = [(ours[way], theirs[way]) for way in ours if way in theirs]
    if not pairs:
        raise UserError(_why_nothing(a, b, list(ours.values()), list(theirs.values())))
    return pairs


def _why_nothing(a: Path, b: Path, ours: list[Measured], theirs: list[Measured]) -> str:
    """Why no evaluation of two runs matches, by the pair that comes nearest."""
    nearest = f"'{a}' and '{b}' have no evaluation in common; evaluate both with the same settings"
    for x in ours:
        for y in theirs:
            if x.entry["name"] == y.entry["name"]:
                try:
                    _check_settings(a, b, x.settings, y.settings)
                    _paired(x, y)
                except UserError as error:
                    nearest = f"no evaluation of '{b}' matches one of '{a}': {error}"
    return nearest


def _strict_pairs(a: Path, b: Path) -> list[tuple[Measured, Measured]]:
    """The datasets of two evaluations, which must be the same ones measured in the same way."""
    first, second = read(a), read(b)
    with damage_named(a, b):
        return _same_datasets(a, b, first, second)


def _same_datasets(a: Path, b: Path, first: dict, second: dict) -> list[tuple[Measured, Measured]]:
    _check_settings(a, b, first["settings"], second["settings"])
    ours, theirs = ({d["name"]: d for d in r["datasets"]} for r in (first, second))
    if ours.keys() != theirs.keys():
        alone = sorted(ours.keys() ^ theirs.keys())
        raise UserError(
            f"'{a}' and '{b}' have other datasets: {', '.join(alone)} stands in one alone; evaluate both on the same"
        )
    for name in ours:
        _check_same(name, ours[name], theirs[name])
    zeroshot = [name for name in ours if ours[name]["kind"] == "zeroshot"]
    if not zeroshot:
        raise UserError(f"'{a}' and '{b}' have no zero-shot dataset; a difference in recall is not tested")
    return [
        (Measured(a, first["settings"], ours[name]), Measured(b, second["settings"], theirs[name])) for name in zeroshot
    ]


def _check_settings(a: Path, b: Path, first: dict, second: dict) -> None:
    first, second = deciding_settings(first), deciding_settings(second)
    for key in sorted(first.keys() | second.keys()):
        x, y = first.get(key), second.get(key)
        if key not in FREE and x != y:
            raise UserError(
                f"'{a}' and '{b}' were measured otherwise: {key} is {x} and {y}; evaluate both with the same settings"
            )


def _check_same(name: str, x: dict, y: dict) -> None:
    """Raises UserError naming what differs in the data of two evaluations, or in how it was shown."""
    for key in DECIDES:
        if x.get(key) != y.get(key):
            at, ours, theirs = _where(x.get(key), y.get(key))
            raise UserError(
                f"{name}: {key}{at} differs, {_short(ours)} and {_short(theirs)}; "
                "evaluate both on the same data in the same way"
            )
    if x["kind"] != "zeroshot":
        return
    for key in ("ids", "labels"):
        if x["samples"][key] != y["samples"][key]:
            raise UserError(f"{name}: samples.{key} differ; evaluate both with the same --n-samples and --seed")
    if x["eps"].keys() != y["eps"].keys():
        raise UserError(f"{name}: eps {', '.join(x['eps'])} and {', '.join(y['eps'])}; evaluate both at the same")


def _paired(first: Measured, second: Measured) -> list[dict]:
    """The differences on one dataset, clean and at each eps."""
    x, y = first.entry, second.entry
    with damage_named(first.path, second.path):
        _check_same(x["name"], x, y)
        flags = {None: (x["samples"]["clean"], y["samples"]["clean"])}
        flags |= {e: (x["samples"]["eps"][e]["robust"], y["samples"]["eps"][e]["robust"]) for e in x["eps"]}
        for f, g in flags.values():
            if not len(f) == len(g) == len(x["samples"]["ids"]):
                raise ValueError("samples of other numbers")
        return [
            {"dataset": x["name"], "eps": eps, "a": sum(f) / len(f), "b": sum(g) / len(g), **paired_difference(f, g)}
            for eps, (f, g) in flags.items()
        ]


def _where(x, y) -> tuple:
    """(`[3]`, its values) where two lists of one length first differ, else ("", both)."""
    if not (isinstance(x, list) and isinstance(y, list) and len(x) == len(y)):
        return "", x, y
    return next((f"[{i}]", a, b) for i, (a, b) in enumerate(zip(x, y)) if a != b)


def _short(value) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
