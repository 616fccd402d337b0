"""The attacks of one radius on a dataset: attack by attack, each on full chunks of what those before left."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import partial
from math import inf

import numpy as np
from torch import Tensor

from ..attacks import ensemble
from ..attacks.ensemble import AttackFacts
from ..attacks.memory import AttackMemory
from ..attacks.state import AttackSettings
from ..config import show_pixels
from ..data.samples import Batch
from .chunk_memory import ChunkMemory
from .protocols import Protocol
from .zeroshot_task import CleanPass, ZeroShotTask


@dataclass(frozen=True)
class AtRadius:
    """What the attacks of one radius did to the samples that are right without attack.

    facts: None where none was attacked. fell_at: the samples that fell at a smaller radius, and were not attacked at
    this one.
    """

    eps: str
    settings: AttackSettings
    facts: AttackFacts | None
    broken_by: dict[int, str | None]  # sample id -> the attack that it fell to, here or at a smaller radius
    prediction: dict[int, int]
    fell_at: dict[int, str]  # sample id -> the smallest radius at which it fell

    def keep_fallen(self, smaller: AtRadius) -> None:
        """Take over what fell at a smaller radius: its adversarial images lie within this one, too."""
        for i, attack in smaller.broken_by.items():
            if attack is not None:
                self.broken_by[i], self.prediction[i] = attack, smaller.prediction[i]
                self.fell_at[i] = smaller.fell_at.get(i, smaller.eps)


def attack_at(
    task: ZeroShotTask, clean: CleanPass, attacks: list[str], eps: Fraction, smaller: AtRadius | None = None
) -> AtRadius:
    """Set the attacks, at one radius, on the sampled images that are right without attack. Collective.

    Each attack takes what the one before left standing on all ranks, in full chunks. smaller: what was found at a
    smaller radius, whose adversarial images lie within this one, too: those samples have fallen.
    """
    settings = attack_settings(task.protocol, float(eps))
    where = f"{task.name} {show_pixels(eps)}"
    _say_what_is_not_understood(task, where)
    found = AtRadius(show_pixels(eps), settings, None, {}, {}, {})
    if smaller is not None:
        found.keep_fallen(smaller)
    standing = np.array([i for i in clean.ids if clean.right(i) and i not in found.fell_at], dtype=np.int64)
    facts, not_finite = [], set()
    for attack in attacks:
        chunk = partial(_attack_chunk, task, attack, settings, f"{where} {attack}")
        rows, _ = task.work.measure(f"{where} {attack}", standing, task.progress, chunk) if len(standing) else ([], [])
        ids = flat(rows, "ids")
        found.broken_by.update(zip(ids, flat(rows, "broken_by")))
        found.prediction.update(zip(ids, flat(rows, "prediction")))
        not_finite |= set(flat(rows, "not_finite"))
        facts.append(ensemble.merge([AttackFacts(**row["facts"]) for row in rows]) if rows else _idle(attack))
        standing = standing[[found.broken_by[i] is None for i in standing.tolist()]]
    return replace(found, facts=ensemble.in_turn(facts, len(not_finite)) if facts[0].n else None)


def _idle(attack: str) -> AttackFacts:
    """The facts of an attack that no sample was left for."""
    nothing = dict.fromkeys(("n", "attacked", "not_finite", "zero_gradient_ce", "taken_back"), 0)
    return AttackFacts(
        **nothing,
        largest_perturbation=0.0,
        lowest_pixel=inf,
        highest_pixel=-inf,
        zero_gradient_dlr=None,
        broken={attack: 0},
        seconds={attack: 0.0},
        queries={attack: 0},
        skipped={},
    )


def _say_what_is_not_understood(task: ZeroShotTask, where: str) -> None:
    """A line where an earlier version kept chunks under all attacks at once, which are measured again."""
    old = [key for key in task.progress.done if key[0] == where]
    if old:
        folder = task.progress.folder
        task.work.say(f"{where}: {len(old)} chunks in '{folder}' are of an earlier version; they are measured again")
    for key in old:
        del task.progress.done[key]


def _attack_chunk(
    task: ZeroShotTask,
    name: str,
    settings: AttackSettings,
    part: str,
    images: Tensor,
    batch: Batch,
    ids: list[int],
) -> dict:
    """One attack on a chunk, which may take hours: it is stopped at any question to a model, and goes on there."""
    heeding = task.work.interruption.heeding
    logits, source = heeding(task.logits), task.transfer_from and heeding(task.transfer_from)
    kept = ChunkMemory(task.progress.memory_file(part, ids), task.work.say, task.progress.graphs)

    def attack(x: Tensor, labels: Tensor, seeds: Tensor) -> dict:
        def run(memory: AttackMemory) -> dict:
            room = task.work.in_batches.limit
            return _row(ensemble.run_attacks(logits, x, labels, seeds, [name], settings, source, room, memory), name)

        return kept.batch(seeds, run)

    labels, seeds = batch.labels.to(images.device), batch.seeds.to(images.device)
    rows = task.work.in_batches(attack, [images, labels, seeds])
    return {
        "broken_by": flat(rows, "broken_by"),
        "prediction": flat(rows, "prediction"),
        "not_finite": [i for i, bad in zip(ids, flat(rows, "not_finite")) if bad],
        "facts": asdict(ensemble.merge([AttackFacts(**row["facts"]) for row in rows])),
    }


def _row(outcome: ensemble.Outcome, attack: str) -> dict:
    """What is kept of a batch, as JSON holds it."""
    return {
        # In another batch than the pass's before, a sample may no longer be right: it is not robust either.
        "broken_by": [
            by or (None if right else attack) for by, right in zip(outcome.broken_by, outcome.clean.tolist())
        ],
        "prediction": outcome.prediction.tolist(),
        "not_finite": outcome.not_finite.tolist(),
        "facts": asdict(outcome.facts),
    }


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


def flat(rows: list[dict], key: str) -> list:
    """The entries of all rows under a key, in their order."""
    return [value for row in rows for value in row[key]]
