"""Zero-shot classification of one dataset.

The clean pass over all samples, then the attacks on a stratified sample at every radius, then the summary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import partial

import numpy as np
import torch
from torch import Tensor

from .. import losses
from ..attacks import checks, ensemble
from ..attacks.checks import health_line
from ..attacks.ensemble import AttackFacts
from ..attacks.state import AttackSettings, Classifier
from ..config import show_pixels
from ..data.dataset import Dataset
from ..data.samples import Batch
from ..errors import UserError
from . import results
from .chunks import ChunkedWork
from .data_checks import not_used
from .partial_results import PartialResults
from .protocols import Protocol
from .statistics import stratified

NOTHING_ATTACKED = health_line("attacks", False, "no sample is classified correctly: nothing to attack")


@dataclass(frozen=True)
class ZeroShotTask:
    """One dataset to be classified. transfer_from: the model that `transfer` attacks in place of this one."""

    name: str
    work: ChunkedWork
    progress: PartialResults
    logits: Classifier
    transfer_from: Classifier | None
    class_names: list[str]
    protocol: Protocol


@dataclass(frozen=True)
class CleanPass:
    """What the model says of every readable sample, and which of them are attacked."""

    labelled: int  # samples with a label, readable or not
    left_out: list[tuple[str, str]]  # (name, reason) of those that could not be read
    prediction: dict[int, int]  # sample id -> class, or losses.NO_CLASS
    label: dict[int, int]
    ids: list[int]  # the stratified sample, in the order of the ids

    def right(self, sample: int) -> bool:
        return self.prediction[sample] == self.label[sample]


@dataclass(frozen=True)
class AtRadius:
    """What the attacks of one radius did to the samples that are right without attack.

    facts: None where there is no such sample.
    """

    settings: AttackSettings
    facts: AttackFacts | None
    broken_by: dict[int, str | None]  # sample id -> the attack that it fell to
    prediction: dict[int, int]


def measure(task: ZeroShotTask) -> dict:
    """The numbers of a dataset, sample by sample, as results.json holds them. Collective."""
    attacks, skipped = defined_attacks(task.protocol, len(task.class_names), task.name)
    clean = clean_pass(task)
    at_radius = {
        show_pixels(eps): attack_at(task, clean, attacks, eps) for eps in task.protocol.radii(task.name)
    }  # fmt: skip
    return summary(task, clean, attacks, skipped, at_radius)


def clean_pass(task: ZeroShotTask) -> CleanPass:
    """Classify every labelled sample, and choose those that are attacked. Collective."""
    labels = task.work.dataset.labels
    labelled = np.flatnonzero(labels >= 0)
    rows, left_out = task.work.measure(
        f"{task.name} clean", labelled, task.progress, partial(_clean_chunk, task), max_left_out=task.work.max_left_out
    )
    read = np.array(_all(rows, "ids"))
    return CleanPass(
        labelled=len(labelled),
        left_out=left_out,
        prediction=dict(zip(read.tolist(), _all(rows, "prediction"))),
        label=dict(zip(read.tolist(), _all(rows, "labels"))),
        ids=read[stratified(labels[read], task.protocol.n_samples, task.protocol.seed)].tolist(),
    )


def _clean_chunk(task: ZeroShotTask, images: Tensor, batch: Batch, ids: list[int]) -> dict:
    def predict(x: Tensor) -> list[int]:
        return losses.predicted_class(task.logits(x)).tolist()

    with torch.no_grad():
        return {"prediction": sum(task.work.in_batches(predict, [images]), []), "labels": batch.labels.tolist()}


def attack_at(task: ZeroShotTask, clean: CleanPass, attacks: list[str], eps: Fraction) -> AtRadius:
    """Set the attacks, at one radius, on the sampled images that are right without attack. Collective."""
    settings = attack_settings(task.protocol, float(eps))
    right = np.array([i for i in clean.ids if clean.right(i)], dtype=np.int64)
    rows, _ = task.work.measure(
        f"{task.name} {show_pixels(eps)}", right, task.progress, partial(_attack_chunk, task, attacks, settings)
    )
    attacked = _all(rows, "ids")
    return AtRadius(
        settings=settings,
        facts=ensemble.merge([AttackFacts(**row["facts"]) for row in rows]) if rows else None,
        broken_by=dict(zip(attacked, _all(rows, "broken_by"))),
        prediction=dict(zip(attacked, _all(rows, "prediction"))),
    )


def _attack_chunk(
    task: ZeroShotTask, attacks: list[str], settings: AttackSettings, images: Tensor, batch: Batch, ids: list[int]
) -> dict:
    # A chunk under all attacks may take hours.
    logits = task.work.interruption.heeding(task.logits)

    def attack(x: Tensor, labels: Tensor, seeds: Tensor) -> ensemble.Outcome:
        return ensemble.run_attacks(logits, x, labels, seeds, attacks, settings, task.transfer_from)

    labels, seeds = batch.labels.to(images.device), batch.seeds.to(images.device)
    outcomes = task.work.in_batches(attack, [images, labels, seeds])
    return {
        # In another batch than the clean pass's, a sample may no longer be right: it is not robust either.
        "broken_by": [
            attack or (None if right else attacks[0])
            for outcome in outcomes
            for attack, right in zip(outcome.broken_by, outcome.clean.tolist())
        ],
        "prediction": sum((outcome.prediction.tolist() for outcome in outcomes), []),
        "facts": asdict(ensemble.merge([outcome.facts for outcome in outcomes])),
    }


def summary(
    task: ZeroShotTask,
    clean: CleanPass,
    attacks: list[str],
    skipped: dict[str, str],
    at_radius: dict[str, AtRadius],
) -> dict:
    """The part of results.json that says what was measured: accuracies, every sample's outcome, health lines."""
    ids, n_all = clean.ids, len(clean.prediction)
    labels, right = [clean.label[i] for i in ids], [clean.right(i) for i in ids]
    broken = {eps: [found.broken_by.get(i) for i in ids] for eps, found in at_radius.items()}
    by_eps = {
        eps: results.under_attack(
            attacks, broken[eps], right, labels, task.class_names, found.facts.seconds if found.facts else {}
        )
        | {"skipped": skipped}
        for eps, found in at_radius.items()
    }
    return {
        "n_total": n_all,
        "left_out": len(clean.left_out),
        "not_used": not_used(task.work.dataset, clean.left_out, labels=True),
        "clean_all": results.accuracy([clean.right(i) for i in clean.prediction]),
        "clean": results.accuracy(right),
        "eps": by_eps,
        "robust_area": results.robust_area(results.accuracy(right), by_eps),
        "samples": {
            "ids": ids,
            "keys": [task.work.dataset.keys[i] for i in ids],
            "labels": labels,
            "clean": right,
            "clean_prediction": [clean.prediction[i] for i in ids],
            "eps": {
                eps: {
                    "broken_by": broken[eps],
                    "prediction": [found.prediction.get(i, clean.prediction[i]) for i in ids],
                    "robust": [stands and by is None for stands, by in zip(right, broken[eps])],
                }
                for eps, found in at_radius.items()
            },
        },
        "health": [
            *results.unread(clean.left_out, clean.labelled),
            *attack_lines(at_radius.values(), skipped),
            finite_line(task.work.dataset, clean.prediction),
        ],
    }


def finite_line(dataset: Dataset, prediction: dict[int, int]) -> dict:
    """The line about the clean pass, which names the first samples without a prediction."""
    bad = [dataset.name(i) for i, k in prediction.items() if k == losses.NO_CLASS]
    line = checks.finite_logits(len(bad), len(prediction))
    first = f" ({', '.join(bad[:3])}{', ...' if len(bad) > 3 else ''})" if bad else ""
    return line | {"detail": line["detail"] + first}


def attack_lines(at_radius: Sequence[AtRadius], skipped: dict[str, str]) -> list[dict]:
    """Whether the attacks can be believed, by what they did at every radius."""
    if not at_radius:
        return []
    facts = [(found.settings, replace(found.facts, skipped=skipped)) for found in at_radius if found.facts]
    return checks.check(facts) if facts else [NOTHING_ATTACKED]


def sanity(task: ZeroShotTask, samples: dict) -> list[dict]:
    """The health checks that need attacks of their own, by the first rank, on some of the measured `samples` of all
    classes. Collective."""
    ids = np.array([i for i, right in zip(samples["ids"], samples["clean"]) if right], dtype=np.int64)
    return task.work.ranks.run_on_first(partial(_sanity_lines, task, ids)) if len(ids) else []


def _sanity_lines(task: ZeroShotTask, ids: np.ndarray) -> list[dict]:
    work, done = task.work, task.progress.done
    if ("sanity", 0) not in done:
        settings = attack_settings(task.protocol, float(task.protocol.radii(task.name)[0]))
        chosen = ids[stratified(work.dataset.labels[ids], checks.SANITY_SAMPLES, work.seed)]
        (batch,) = work.batches(chosen, len(chosen))
        images = batch.pixels(work.ranks.device)
        labels, seeds = batch.labels.to(work.ranks.device), batch.seeds.to(work.ranks.device)
        lines = checks.sanity(task.logits, images, labels, seeds, settings, task.transfer_from, work.in_batches)
        task.progress.add("sanity", 0, {"lines": lines})
    return done["sanity", 0]["lines"]


def attack_settings(protocol: Protocol, eps: float) -> AttackSettings:
    """The attacks' settings at one radius."""
    step_size = None if protocol.step_size is None else float(protocol.step_size)
    return AttackSettings(
        eps=eps,
        norm=protocol.norm,
        iters=protocol.iters,
        restarts=protocol.restarts,
        queries=protocol.queries,
        step_size=step_size,
    )


def defined_attacks(protocol: Protocol, n_classes: int, name: str) -> tuple[list[str], dict[str, str]]:
    """The protocol's attacks that exist for so many classes, and why the others do not.

    Raises UserError when none does.
    """
    ran, skipped = ensemble.defined_attacks(protocol.attacks, n_classes)
    if not ran:
        reasons = "; ".join(f"{attack}: {reason}" for attack, reason in skipped.items())
        remedy = "add --attacks apgd-ce" if n_classes > 1 else "name all of the model's classes, one a line"
        raise UserError(f"{name}: no attack is left ({reasons}); {remedy}")
    return ran, skipped


def _all(rows: list[dict], key: str) -> list:
    return [value for row in rows for value in row[key]]


def check_labels(dataset: Dataset, names: list[str], where: str) -> None:
    """Raises UserError when there is nothing to measure, or labels have no names."""
    if not (dataset.labels >= 0).any():
        why = "; ".join(dataset.index.notes())
        raise UserError(
            f"'{where}' has no sample with a usable label: {why}; evaluation needs the number of the class, from 0, in "
            "a .cls member beside each image, or in a .json member at a key that is named (label_key, --label-key)"
        )
    if dataset.labels.max() >= len(names):
        raise UserError(
            f"classnames: {len(names)} names, but '{where}' has label {dataset.labels.max()}; "
            "give the names of these labels"
        )
