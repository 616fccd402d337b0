"""Evaluations that may stand in one table: measured in the same way, the newest of each model and dataset."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from ..config import parse_fraction
from ..evaluate.statistics import paired_difference
from .records import Retrieval, Zeroshot
from .sources import Source

FREE = ("batch_size", "eps", "eps_of")  # settings that do not change what a number at one radius means
LEFT_OUT_OF_MEANS = "ImageNet"


@dataclass
class Group:
    """`models[i]`: the datasets by name of the i-th model, in the order of the report's sources (empty where it has none)."""

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


def group(sources: list[Source]) -> list[Group]:
    """The groups in the order in which their first evaluation is met."""
    groups: dict[str, Group] = {}
    taken: dict[tuple, str] = {}
    for i, source in enumerate(sources):
        for evaluation in reversed(source.evaluations):
            settings = evaluation.settings.model_dump(mode="json")
            key = json.dumps([evaluation.protocol, {k: v for k, v in settings.items() if k not in FREE}], sort_keys=True)
            if key not in groups:
                title = f"protocol {evaluation.protocol}: {evaluation.settings.norm}, {', '.join(evaluation.settings.attacks)}, {evaluation.settings.iters} iterations"
                groups[key] = Group(title, evaluation.settings.norm, [{} for _ in sources], [{} for _ in sources])
            found = groups[key]
            for dataset in evaluation.datasets:
                if (key, i, dataset.name) in taken:
                    newer = taken[key, i, dataset.name]
                    found.older.append(f"{source.name}, {dataset.name}: {evaluation.path} ({newer} is newer)")
                    continue
                taken[key, i, dataset.name] = str(evaluation.path)
                if isinstance(dataset, Zeroshot | Retrieval):
                    (found.models if isinstance(dataset, Zeroshot) else found.retrieval)[i][dataset.name] = dataset
    return list(groups.values())


def difference(first: Zeroshot, other: Zeroshot, eps: str | None) -> dict | None:
    """How `other`'s accuracy at a radius (None: clean, all samples) differs from `first`'s, as a fraction.

    `p`: McNemar's, of the samples that both models were attacked on; None where they are not the same samples.
    """
    if eps is None:
        return {"difference": other.clean_all.accuracy - first.clean_all.accuracy, "p": None, "paired": first.fingerprint == other.fingerprint}
    if eps not in first.eps or eps not in other.eps:
        return None
    a, b = first.samples, other.samples
    if (first.fingerprint, a.ids, a.labels) != (other.fingerprint, b.ids, b.labels):
        return {"difference": other.eps[eps].robust.accuracy - first.eps[eps].robust.accuracy, "p": None, "paired": False}
    return {**paired_difference(a.eps[eps].robust, b.eps[eps].robust), "paired": True}


def mean(datasets: list[Zeroshot], eps: str | None) -> float | None:
    """The unweighted mean accuracy at a radius (None: clean); None when a dataset lacks it or there is none."""
    if not datasets or (eps is not None and any(eps not in d.eps for d in datasets)):
        return None
    return sum(d.clean_all.accuracy if eps is None else d.eps[eps].robust.accuracy for d in datasets) / len(datasets)
