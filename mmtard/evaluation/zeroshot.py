"""Zero-shot classification of one dataset.

The clean pass over all samples, then the attacks on a stratified sample at every radius, then the summary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from .. import losses
from ..attacks import checks, ensemble
from ..attacks.checks import health_line
from ..config import show_pixels
from ..data.dataset import Dataset
from ..data.samples import Batch
from ..distributed.interruption import StoppedWithin
from ..errors import UserError
from . import results
from .at_radius import AtRadius, attack_at, attack_settings, flat
from .data_checks import not_used
from .protocols import Protocol
from .statistics import stratified
from .zeroshot_task import CleanPass, ZeroShotTask

NOTHING_ATTACKED = health_line("attacks", False, "no sample is classified correctly: nothing to attack")


def measure(task: ZeroShotTask) -> dict:
    """The numbers of a dataset, sample by sample, as results.json holds them. Collective."""
    attacks, skipped = defined_attacks(task.protocol, len(task.class_names), task.name)
    clean = clean_pass(task)
    radii = task.protocol.radii(task.name)
    found: dict[str, AtRadius] = {}
    smaller = None
    for eps in sorted(radii):
        smaller = found[show_pixels(eps)] = attack_at(task, clean, attacks, eps, smaller)
        if task.protocol.independent_radii:
            smaller = None
    return summary(task, clean, attacks, skipped, {show_pixels(eps): found[show_pixels(eps)] for eps in radii})


def clean_pass(task: ZeroShotTask) -> CleanPass:
    """Classify every labelled sample, and choose those that are attacked. Collective."""
    labels = task.work.dataset.labels
    labelled = np.flatnonzero(labels >= 0)
    rows, left_out = task.work.measure(
        f"{task.name} clean", labelled, task.progress, partial(_clean_chunk, task), max_left_out=task.work.max_left_out
    )
    read = np.array(flat(rows, "ids"))
    return CleanPass(
        labelled=len(labelled),
        left_out=left_out,
        prediction=dict(zip(read.tolist(), flat(rows, "prediction"))),
        label=dict(zip(read.tolist(), flat(rows, "labels"))),
        ids=read[stratified(labels[read], task.protocol.n_samples, task.protocol.seed)].tolist(),
    )


def _clean_chunk(task: ZeroShotTask, images: Tensor, batch: Batch, ids: list[int]) -> dict:
    def predict(x: Tensor) -> list[int]:
        return losses.predicted_class(task.logits(x)).tolist()

    with torch.no_grad():
        return {"prediction": sum(task.work.in_batches(predict, [images]), []), "labels": batch.labels.tolist()}


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
    by_eps = {}
    for eps, found in at_radius.items():
        seconds = found.facts.seconds if found.facts else {}
        robust = results.under_attack(attacks, broken[eps], right, labels, task.class_names, seconds)
        smaller = {"fell_at_smaller": len(found.fell_at)} if found.fell_at else {}
        by_eps[eps] = robust | {"skipped": skipped} | smaller
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
            "eps": {eps: _of_samples(ids, clean, found) for eps, found in at_radius.items()},
        },
        "health": [
            *results.unread(clean.left_out, clean.labelled),
            *attack_lines(at_radius.values(), skipped),
            finite_line(task.work.dataset, clean.prediction),
        ],
    }


def _of_samples(ids: list[int], clean: CleanPass, found: AtRadius) -> dict[str, list]:
    """Every attacked sample's outcome at a radius, in the order of `ids`."""
    broken = [found.broken_by.get(i) for i in ids]
    return {
        "broken_by": broken,
        "prediction": [found.prediction.get(i, clean.prediction[i]) for i in ids],
        "robust": [clean.right(i) and by is None for i, by in zip(ids, broken)],
        **({"fell_at": [found.fell_at.get(i) for i in ids]} if found.fell_at else {}),
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
    if not facts:
        return [NOTHING_ATTACKED]
    lines = checks.check(facts)
    if any(found.fell_at for found in at_radius):
        for line in lines:
            if line["check"] == "monotone in eps":
                line["detail"] += "; what fell at a smaller eps was not attacked again"
    return lines


def sanity(task: ZeroShotTask, samples: dict) -> list[dict]:
    """The health checks that need attacks of their own, by the first rank, on some of the measured `samples` of all
    classes. Collective."""
    ids = np.array([i for i, right in zip(samples["ids"], samples["clean"]) if right], dtype=np.int64)
    if not len(ids):
        return []
    lines = task.work.ranks.run_on_first(partial(_sanity_lines, task, ids))
    task.work.agree(task.progress)
    return lines


def _sanity_lines(task: ZeroShotTask, ids: np.ndarray) -> list[dict]:
    """The lines; [] where a signal stopped the checks."""
    work, done, heeding = task.work, task.progress.done, task.work.interruption.heeding
    if ("sanity", 0) not in done:
        settings = attack_settings(task.protocol, float(task.protocol.radii(task.name)[0]))
        chosen = ids[stratified(work.dataset.labels[ids], checks.SANITY_SAMPLES, work.seed)]
        (batch,) = work.batches(chosen, len(chosen))
        images = batch.pixels(work.ranks.device)
        labels, seeds = batch.labels.to(work.ranks.device), batch.seeds.to(work.ranks.device)
        logits, source = heeding(task.logits), task.transfer_from and heeding(task.transfer_from)
        try:
            lines = checks.sanity(logits, images, labels, seeds, settings, source, work.in_batches)
        except StoppedWithin:
            return []
        task.progress.add("sanity", 0, {"lines": lines})
    return done["sanity", 0]["lines"]


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
