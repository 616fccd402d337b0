"""Zero-shot classification of one dataset: clean on all samples, then the attacks on a stratified sample, at every radius."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import torch

from ..attacks import checks, ensemble
from ..attacks.state import AttackSettings, Classifier
from ..config import show_pixels
from ..data.dataset import Dataset
from ..errors import UserError
from . import results
from .chunks import ChunkedWork
from .partial_results import PartialResults
from .protocols import Protocol
from .statistics import stratified

NOTHING_ATTACKED = {
    "check": "attacks",
    "status": "WARN",
    "detail": "no sample is classified correctly: nothing to attack",
}


def measure(
    work: ChunkedWork,
    logits: Classifier,
    source: Classifier | None,
    names: list[str],
    protocol: Protocol,
    name: str,
    progress: PartialResults,
) -> dict:
    """The numbers of a dataset, sample by sample, as results.json holds them. Collective.

    source: the model that `transfer` attacks in place of this one.
    """

    def clean_chunk(images, batch, asked):
        with torch.no_grad():
            found = [z.argmax(1).tolist() for z in work.halving(logits, [images])]
        return {"prediction": sum(found, []), "labels": batch.labels.tolist()}

    asked_for = np.flatnonzero(work.dataset.labels >= 0)
    rows, left_out = work.measure(f"{name} clean", asked_for, progress, clean_chunk, max_left_out=work.max_left_out)
    prediction, label = (dict(zip(_all(rows, "ids"), _all(rows, key))) for key in ("prediction", "labels"))
    everyone = np.array(_all(rows, "ids"))
    ids = everyone[stratified(work.dataset.labels[everyone], protocol.n_samples, protocol.seed)].tolist()
    labels, clean = [label[i] for i in ids], [prediction[i] == label[i] for i in ids]
    attackable = np.array([i for i, right in zip(ids, clean) if right], dtype=np.int64)
    ran, skipped = defined_attacks(protocol, len(names), name)
    by_eps, samples_by_eps, facts = {}, {}, []
    for eps in protocol.radii(name):
        settings = attack_settings(protocol, float(eps))

        def attack_chunk(images, batch, asked):
            def attack(x, y, s):
                return ensemble.run_attacks(logits, x, y, s, ran, settings, source)

            outcomes = work.halving(attack, [images, batch.labels.to(images.device), batch.seeds.to(images.device)])
            merged = ensemble.merge([o.facts for o in outcomes])
            # A sample that this pass no longer classifies correctly, in another batch than the clean one, is not robust either.
            broken = [
                by or (None if right else ran[0]) for o in outcomes for by, right in zip(o.broken_by, o.clean.tolist())
            ]
            return {
                "broken_by": broken,
                "prediction": sum((o.prediction.tolist() for o in outcomes), []),
                "facts": asdict(merged),
            }

        found, _ = work.measure(f"{name} {show_pixels(eps)}", attackable, progress, attack_chunk)
        at_eps = ensemble.merge([ensemble.AttackFacts(**row["facts"]) for row in found]) if found else None
        facts += [(settings, replace(at_eps, skipped=skipped))] if at_eps else []
        broken_by, attacked = (dict(zip(_all(found, "ids"), _all(found, key))) for key in ("broken_by", "prediction"))
        broken = [broken_by.get(i) for i in ids]
        summary = results.under_attack(ran, broken, clean, labels, names, at_eps.seconds if at_eps else {})
        by_eps[show_pixels(eps)] = {**summary, "skipped": skipped}
        samples_by_eps[show_pixels(eps)] = {
            "broken_by": broken,
            "prediction": [attacked.get(i, prediction[i]) for i in ids],
            "robust": [right and by is None for right, by in zip(clean, broken)],
        }
    return {
        "n_total": len(everyone),
        "left_out": len(left_out),
        "clean_all": results.accuracy([prediction[i] == label[i] for i in everyone.tolist()]),
        "clean": results.accuracy(clean),
        "eps": by_eps,
        "samples": {
            "ids": ids,
            "keys": [work.dataset.keys[i] for i in ids],
            "labels": labels,
            "clean": clean,
            "clean_prediction": [prediction[i] for i in ids],
            "eps": samples_by_eps,
        },
        "health": results.unread(left_out, len(asked_for)) + (checks.check(facts) if facts else [NOTHING_ATTACKED]),
    }


def sanity(
    work: ChunkedWork,
    logits: Classifier,
    source: Classifier | None,
    samples: dict,
    protocol: Protocol,
    name: str,
    progress: PartialResults,
) -> list[dict]:
    """The health checks that need attacks of their own, by the first rank, on some of the measured `samples` of all classes. Collective."""
    ids = np.array([i for i, right in zip(samples["ids"], samples["clean"]) if right], dtype=np.int64)
    settings = attack_settings(protocol, float(protocol.radii(name)[0]))

    def lines() -> list[dict]:
        if not len(ids):
            return []
        if ("sanity", 0) not in progress.done:
            chosen = ids[stratified(work.dataset.labels[ids], checks.SANITY_SAMPLES, work.seed)]
            (batch,) = work.batches(chosen, len(chosen))
            images = batch.pixels(work.ranks.device)
            labels, seeds = batch.labels.to(work.ranks.device), batch.seeds.to(work.ranks.device)
            progress.add(
                "sanity",
                0,
                {"lines": checks.sanity(logits, images, labels, seeds, settings, source, work.halving)},
            )
        return progress.done["sanity", 0]["lines"]

    return work.ranks.run_on_first(lines)


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
    """The protocol's attacks that exist for so many classes, and why the others do not. Raises UserError when none does."""
    ran, skipped = ensemble.defined_attacks(protocol.attacks, n_classes)
    if not ran:
        reasons = "; ".join(f"{attack}: {reason}" for attack, reason in skipped.items())
        raise UserError(f"{name}: no attack is left ({reasons}); add --attacks apgd-ce")
    return ran, skipped


def _all(rows: list[dict], key: str) -> list:
    return [value for row in rows for value in row[key]]


def check_labels(dataset: Dataset, names: list[str], where: str) -> None:
    """Raises UserError when there is nothing to measure, or labels have no names."""
    if not (dataset.labels >= 0).any():
        raise UserError(f"'{where}' has no labelled sample; evaluation needs a .cls member beside each image")
    if dataset.labels.max() >= len(names):
        raise UserError(
            f"classnames: {len(names)} names, but '{where}' has label {dataset.labels.max()}; give the names of these labels"
        )
