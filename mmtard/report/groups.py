"""Evaluations that may stand in one table, and datasets that may share a row: measured alike, newest first."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from ..config import parse_fraction
from ..evaluation.statistics import paired_difference
from .records import Evaluation, Measured, Retrieval, Zeroshot
from .run_files import ReportSource

FREE = (
    "batch_size",
    "compile",
    "sanity",
    "eps",
    "eps_of",
    "independent_radii",
)  # settings that do not change what a number at one radius means
# What differs in the `way` of two datasets of one name, as it is said in their rows' names.
WAYS = {
    "fingerprint": "data",
    "perturb_at": "perturbed at",
    "classes": "class names",
    "templates": "prompts",
}
LEFT_OUT_OF_MEANS = "ImageNet"


@dataclass
class Group:
    """Evaluations with the same settings.

    models[i]: the datasets of the i-th model by the row they stand in, in the order of the report's sources (empty
    where it has none). A row is called by the name of its dataset, and by what differs where other data or another way
    of asking have that name, too.
    """

    title: str
    norm: str
    models: list[dict[str, Zeroshot]]
    retrieval: list[dict[str, Retrieval]]
    older: list[str] = field(default_factory=list)  # evaluations that a newer one of the same kind stands for

    @property
    def datasets(self) -> list[str]:
        """The rows, in the order in which the models have them."""
        return list(dict.fromkeys(name for model in self.models for name in model))

    @property
    def eps(self) -> list[str]:
        """Every radius, ascending."""
        return sorted({e for model in self.models for d in model.values() for e in d.eps}, key=parse_fraction)

    @property
    def shared(self) -> list[str]:
        """Datasets that every model of the group has: those a mean may be taken over."""
        having = [model for model in self.models if model]
        return [name for name in self.datasets if all(name in model for model in having)]

    @property
    def prompts(self) -> dict[tuple[str, ...], list[str]]:
        """The rows that each set of prompts was asked in."""
        found: dict[tuple[str, ...], list[str]] = {}
        for model in self.models:
            for name, dataset in model.items():
                rows = found.setdefault(tuple(dataset.templates), [])
                rows += [name] if name not in rows else []
        return found


def group(sources: list[ReportSource]) -> list[Group]:
    """Return the groups in the order in which their first evaluation is met."""
    groups: dict[str, Group] = {}
    # Of each group: (model, row) -> the newest, and its file.
    taken: dict[str, dict[tuple[int, str], tuple[Measured, str]]] = {}
    for i, source in enumerate(sources):
        for evaluation in reversed(source.evaluations):
            settings = evaluation.settings.model_dump(mode="json")
            same = {k: v for k, v in settings.items() if k not in FREE}
            key = json.dumps([evaluation.protocol, same], sort_keys=True)
            if key not in groups:
                empty = [[{} for _ in sources] for _ in range(2)]
                groups[key] = Group(_title(evaluation), evaluation.settings.norm, *empty)
            for dataset in evaluation.datasets:
                row = i, json.dumps([dataset.name, dataset.kind, dataset.way])
                _, newer = taken.setdefault(key, {}).setdefault(row, (dataset, str(evaluation.path)))
                if newer != str(evaluation.path):
                    groups[key].older.append(f"{source.name}, {dataset.name}: {evaluation.path} ({newer} is newer)")
    for key, found in taken.items():
        names = _row_names([dataset for dataset, _ in found.values()])
        for ((i, _), (dataset, _)), name in zip(found.items(), names):
            if isinstance(dataset, Zeroshot | Retrieval):
                (groups[key].models if isinstance(dataset, Zeroshot) else groups[key].retrieval)[i][name] = dataset
    return list(groups.values())


def _title(evaluation: Evaluation) -> str:
    how = evaluation.settings
    return f"protocol {evaluation.protocol}: {how.norm}, {', '.join(how.attacks)}, {how.iters} iterations"


def _row_names(datasets: list[Measured]) -> list[str]:
    """A name for each: the same for the same data asked in the same way, another for others."""
    ways: dict[str, list[dict]] = {}
    for dataset in datasets:
        ways.setdefault(dataset.name, []).append(dataset.way)
    names = []
    for dataset in datasets:
        differ = [key for key in WAYS if any(way[key] != dataset.way[key] for way in ways[dataset.name])]
        said = ", ".join(f"{WAYS[key]} {_way(dataset, key)}" for key in differ)
        names.append(f"{dataset.name} ({said})" if said else dataset.name)
    return names


def _way(dataset: Measured, key: str) -> str:
    templates = getattr(dataset, "templates", [])
    return f"“{templates[0]}”" if key == "templates" and len(templates) == 1 else dataset.way[key][:8]


def difference(first: Zeroshot, other: Zeroshot, eps: str | None) -> dict | None:
    """Say how `other`'s accuracy at a radius (None: clean, all samples) differs from `first`'s, as a fraction.

    `p`: McNemar's, of the samples that both models were attacked on; None where they are not the same samples.
    """
    if eps is None:
        change = other.clean_all.accuracy - first.clean_all.accuracy
        return {"difference": change, "p": None, "paired": first.way == other.way}
    if eps not in first.eps or eps not in other.eps:
        return None
    a, b = first.samples, other.samples
    same = (first.way, a.ids, a.labels) == (other.way, b.ids, b.labels)
    if not (same and a.ids and eps in a.eps and eps in b.eps):
        change = other.eps[eps].robust.accuracy - first.eps[eps].robust.accuracy
        return {"difference": change, "p": None, "paired": False}
    return {**paired_difference(a.eps[eps].robust, b.eps[eps].robust), "paired": True}


def mean(datasets: list[Zeroshot], eps: str | None) -> float | None:
    """Return the unweighted mean accuracy at a radius (None: clean); None when a dataset lacks it or there is none."""
    if not datasets or (eps is not None and any(eps not in d.eps for d in datasets)):
        return None
    return sum(d.clean_all.accuracy if eps is None else d.eps[eps].robust.accuracy for d in datasets) / len(datasets)
