"""Evaluations that may stand in one table, and datasets that may share a row: measured in the same way, the newest of each model."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from ..config import parse_fraction
from ..evaluation.statistics import paired_difference
from .records import Measured, Retrieval, Zeroshot
from .sources import ReportSource

FREE = ("batch_size", "sanity", "eps", "eps_of")  # settings that do not change what a number at one radius means
WAYS = {
    "fingerprint": "data",
    "perturb_at": "perturbed at",
    "classes": "class names",
    "templates": "prompts",
}  # of `way`, in a row's name
LEFT_OUT_OF_MEANS = "ImageNet"


@dataclass
class Group:
    """`models[i]`: the datasets of the i-th model by the row they stand in, in the order of the report's sources (empty where it has none).

    A row is called by the name of its dataset, and where other data or another way of asking have that name, too, by what differs.
    """

    title: str
    norm: str
    models: list[dict[str, Zeroshot]]
    retrieval: list[dict[str, Retrieval]]
    older: list[str] = field(default_factory=list)  # evaluations that a newer one of the same kind stands for

    @property
    def datasets(self) -> list[str]:
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


def group(sources: list[ReportSource]) -> list[Group]:
    """The groups in the order in which their first evaluation is met."""
    groups: dict[str, Group] = {}
    taken: dict[
        str, dict[tuple[int, str], tuple[Measured, str]]
    ] = {}  # of each group: (model, row) -> the newest, and its file
    for i, source in enumerate(sources):
        for evaluation in reversed(source.evaluations):
            settings = evaluation.settings.model_dump(mode="json")
            key = json.dumps(
                [evaluation.protocol, {k: v for k, v in settings.items() if k not in FREE}], sort_keys=True
            )
            if key not in groups:
                title = f"protocol {evaluation.protocol}: {evaluation.settings.norm}, {', '.join(evaluation.settings.attacks)}, {evaluation.settings.iters} iterations"
                groups[key] = Group(title, evaluation.settings.norm, [{} for _ in sources], [{} for _ in sources])
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


def _row_names(datasets: list[Measured]) -> list[str]:
    """A name for each: the same for the same data asked in the same way, another for others."""
    ways: dict[str, list[dict]] = {}
    for dataset in datasets:
        ways.setdefault(dataset.name, []).append(dataset.way)
    names = []
    for dataset in datasets:
        differ = [key for key in WAYS if any(way[key] != dataset.way[key] for way in ways[dataset.name])]
        said = ", ".join(f"{WAYS[key]} {dataset.way[key][:8]}" for key in differ)
        names.append(f"{dataset.name} ({said})" if said else dataset.name)
    return names


def difference(first: Zeroshot, other: Zeroshot, eps: str | None) -> dict | None:
    """How `other`'s accuracy at a radius (None: clean, all samples) differs from `first`'s, as a fraction.

    `p`: McNemar's, of the samples that both models were attacked on; None where they are not the same samples.
    """
    if eps is None:
        return {
            "difference": other.clean_all.accuracy - first.clean_all.accuracy,
            "p": None,
            "paired": first.way == other.way,
        }
    if eps not in first.eps or eps not in other.eps:
        return None
    a, b = first.samples, other.samples
    if (first.way, a.ids, a.labels) != (other.way, b.ids, b.labels):
        return {
            "difference": other.eps[eps].robust.accuracy - first.eps[eps].robust.accuracy,
            "p": None,
            "paired": False,
        }
    return {**paired_difference(a.eps[eps].robust, b.eps[eps].robust), "paired": True}


def mean(datasets: list[Zeroshot], eps: str | None) -> float | None:
    """The unweighted mean accuracy at a radius (None: clean); None when a dataset lacks it or there is none."""
    if not datasets or (eps is not None and any(eps not in d.eps for d in datasets)):
        return None
    return sum(d.clean_all.accuracy if eps is None else d.eps[eps].robust.accuracy for d in datasets) / len(datasets)
