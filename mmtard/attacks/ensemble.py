"""A model under a list of attacks, a batch at a time, each sample's worst case.

    outcome = ensemble.run_attacks(model, images, labels, seeds, attacks, settings, source=None)
    facts = ensemble.merge([outcome.facts, ...])

model: images [B,3,H,W] float32 in [0,1] -> logits [B,C] float32, in eval mode. seeds: int64 [B], a sample's own: its
outcome does not depend on the batch it stands in, nor on the world size. attacks: names of `registry.ATTACKS`, run in
this order, each on the samples that are classified correctly and still stand. settings: `AttackSettings` (eps, norm,
iters, ...).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from .. import losses
from . import registry
from .inputs import check_images, check_label_range, check_per_sample
from .memory import AttackMemory
from .state import AttackSettings, AttackState, Classifier, SampleLoss, logits_of
from .threat_model import perturbation_size

Number = TypeVar("Number", int, float)


@dataclass
class AttackFacts:
    """What a batch's attacks did: numbers that add up over batches and ranks (`merge`) and fit into JSON (`asdict`)."""

    n: int  # samples
    attacked: int  # of them classified correctly, so attacked
    largest_perturbation: float  # in the settings' norm
    lowest_pixel: float
    highest_pixel: float
    not_finite: int  # samples with a NaN or infinity among their logits or pixels
    zero_gradient_ce: int  # attacked samples whose clean cross-entropy has no gradient at all
    zero_gradient_dlr: int | None  # None: fewer than 3 classes
    taken_back: int  # samples broken at attack time that a later forward pass of the same images classifies correctly
    broken: dict[str, int]  # samples broken by each attack, in the order they ran
    seconds: dict[str, float]
    queries: dict[str, int]  # forward passes of the model, summed over samples
    skipped: dict[str, str]  # attack -> why it is not defined here


@dataclass
class Outcome:
    """One batch's samples after every attack; tensors on the images' device."""

    clean: Tensor  # bool [B]: classified correctly without attack
    clean_prediction: Tensor  # int64 [B]; losses.NO_CLASS (-1) where the clean image's logits are not finite
    broken_by: list[str | None]  # the attack that a sample fell to; None: stands, or was wrong without attack
    prediction: Tensor  # int64 [B]: of `adv`, by the forward pass of the attack itself
    # [B,3,H,W]: the first misclassified iterate where broken, else the last attack's of largest loss; never attacked:
    # the image itself.
    adv: Tensor
    not_finite: Tensor  # bool [B]: NaN or infinity among its pixels, or once among its logits
    facts: AttackFacts

    @property
    def robust(self) -> Tensor:
        """bool [B]: correct without attack and under every one."""
        return self.clean & torch.tensor([b is None for b in self.broken_by], device=self.clean.device)


def run_attacks(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    seeds: Tensor,
    attacks: Sequence[str],
    settings: AttackSettings,
    source: Classifier | None = None,
    room: int | None = None,
    memory: AttackMemory | None = None,
) -> Outcome:
    """Set the attacks on a batch. source: the other model of `transfer`, with the same classes.

    room: samples that the device takes at once; where fewer stand, starts at several targets share a batch, which
    changes no outcome. None: as many as there are here. memory: of a single attack, which goes
    on where an earlier process has left it.

    A clean image whose logits are not finite counts as wrong and is not attacked. Raises UserError for images that
    are not float32 [B,C,H,W] in [0,1], labels or seeds that are not int64 [B] on their device, labels beyond the
    logits, an unknown attack, and a model that gives anything but float32 logits [B,C].
    """
    for name in attacks:
        registry.find_attack(name)
    check_images(images)
    check_per_sample(labels, images, "labels")
    check_per_sample(seeds, images, "seeds")
    with torch.no_grad():
        logits = logits_of(model, images)
    n_classes = logits.shape[1]
    check_label_range(labels, n_classes)
    ran, skipped = defined_attacks(attacks, n_classes)
    ensemble = _Ensemble(
        model, images, labels, seeds, settings, source, losses.predicted_class(logits), room or len(images)
    )
    ensemble.memory = memory
    for name in ran:
        ensemble.run(name)
    return ensemble.outcome(n_classes, skipped)


def defined_attacks(names: Sequence[str], n_classes: int) -> tuple[list[str], dict[str, str]]:
    """The attacks of `names` that exist for so many classes, in their order, and why each of the others does not.

    Raises UserError for an unknown name.
    """
    reasons = {name: registry.not_defined(name, n_classes) for name in map(registry.attack_name, names)}
    ran = [name for name, reason in reasons.items() if reason is None]
    return ran, {name: reason for name, reason in reasons.items() if reason is not None}


class _Ensemble:
    """A batch on its way through the attacks: what stands, and what became of every sample."""

    def __init__(
        self,
        model: Classifier,
        images: Tensor,
        labels: Tensor,
        seeds: Tensor,
        settings: AttackSettings,
        source: Classifier | None,
        clean_prediction: Tensor,
        room: int,
    ):
        self.model, self.source, self.settings, self.room = model, source, settings, room
        self.memory: AttackMemory | None = None
        self.images, self.labels, self.seeds = images, labels, seeds
        self.clean_prediction = clean_prediction
        self.clean = clean_prediction == labels
        self.stands = self.clean.clone()
        self.not_finite = clean_prediction == losses.NO_CLASS
        self.adv, self.prediction = images.clone(), clean_prediction.clone()
        self.broken_by: list[str | None] = [None] * len(labels)
        self.broken: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.queries: dict[str, int] = {}

    def run(self, name: str) -> None:
        """Set one attack on the samples that stand."""
        rows, began = self.stands.nonzero().flatten(), time.monotonic()
        batch = self.images[rows], self.labels[rows], self.seeds[rows]
        state = AttackState(self.model, *batch, self.settings, self.source, self.room)
        if self.memory is not None:
            self.memory.attach(state)
        if len(rows):
            registry.find_attack(name)(state)
        self.adv[rows], self.prediction[rows] = state.adv, state.prediction
        self.not_finite[rows] |= state.not_finite
        fallen = rows[state.broken]
        self.stands[fallen] = False
        for i in fallen.tolist():
            self.broken_by[i] = name
        self.broken[name], self.queries[name] = len(fallen), state.queries
        self.seconds[name] = time.monotonic() - began  # the counts above have waited for the device

    def outcome(self, n_classes: int, skipped: dict[str, str]) -> Outcome:
        """What became of every sample. skipped: the attacks that do not exist here, and why."""
        delta, attacked = self.adv - self.images, self.clean.nonzero().flatten()
        images, labels = self.images[attacked], self.labels[attacked]
        self.not_finite |= ~self.adv.flatten(1).isfinite().all(1)
        facts = AttackFacts(
            n=len(self.labels),
            attacked=len(attacked),
            largest_perturbation=float(perturbation_size(delta, self.settings.norm).max()),
            lowest_pixel=float(self.adv.min()),
            highest_pixel=float(self.adv.max()),
            not_finite=int(self.not_finite.sum()),
            zero_gradient_ce=zero_gradients(self.model, images, labels, losses.cross_entropy),
            zero_gradient_dlr=zero_gradients(self.model, images, labels, losses.dlr) if n_classes >= 3 else None,
            taken_back=_taken_back(self.model, self.adv, self.labels, self.clean & ~self.stands),
            broken=self.broken,
            seconds=self.seconds,
            queries=self.queries,
            skipped=skipped,
        )
        found = self.clean, self.clean_prediction, self.broken_by, self.prediction, self.adv, self.not_finite
        return Outcome(*found, facts)


def merge(facts: Sequence[AttackFacts]) -> AttackFacts:
    """The facts of several batches (or ranks) of the same run as one."""
    dlr = [f.zero_gradient_dlr for f in facts if f.zero_gradient_dlr is not None]
    return AttackFacts(
        n=sum(f.n for f in facts),
        attacked=sum(f.attacked for f in facts),
        largest_perturbation=max(f.largest_perturbation for f in facts),
        lowest_pixel=min(f.lowest_pixel for f in facts),
        highest_pixel=max(f.highest_pixel for f in facts),
        not_finite=sum(f.not_finite for f in facts),
        zero_gradient_ce=sum(f.zero_gradient_ce for f in facts),
        zero_gradient_dlr=sum(dlr) if dlr else None,
        taken_back=sum(f.taken_back for f in facts),
        broken=_added([f.broken for f in facts]),
        seconds=_added([f.seconds for f in facts]),
        queries=_added([f.queries for f in facts]),
        skipped={name: reason for f in facts for name, reason in f.skipped.items()},
    )


def in_turn(facts: Sequence[AttackFacts], not_finite: int) -> AttackFacts:
    """The facts of attacks that ran one after the other, each on all samples that the one before left standing.

    A sample that is no longer right without attack, in the batch of a later one, counts as broken by it. not_finite:
    samples that gave NaN or infinity under any of them.
    """
    first = facts[0]
    lost = [{name: f.n - f.attacked for name in f.broken} for f in facts[1:]]
    return replace(
        merge(facts),
        n=first.n,
        attacked=first.attacked,
        not_finite=not_finite,
        zero_gradient_ce=first.zero_gradient_ce,
        zero_gradient_dlr=first.zero_gradient_dlr,
        broken=_added([*(f.broken for f in facts), *lost]),
    )


def _added(counts: Sequence[dict[str, Number]]) -> dict[str, Number]:
    """The sum of each name's numbers, in the order in which the names first stand."""
    total: dict[str, Number] = {}
    for count in counts:
        for name, number in count.items():
            total[name] = total[name] + number if name in total else number
    return total


def zero_gradients(model: Classifier, images: Tensor, labels: Tensor, loss_fn: SampleLoss) -> int:
    """How many samples have a gradient that is zero in every pixel: no gradient-based attack moves them."""
    if not len(images):
        return 0
    with torch.enable_grad():
        x = images.clone().requires_grad_(True)
        loss = loss_fn(logits_of(model, x), labels).sum()
        gradient = torch.autograd.grad(loss, x, allow_unused=True)[0] if loss.requires_grad else None
    return len(images) if gradient is None else int((gradient.flatten(1) == 0).all(1).sum())


def _taken_back(model: Classifier, adv: Tensor, labels: Tensor, broken: Tensor) -> int:
    if not broken.any():
        return 0
    with torch.no_grad():
        return int(losses.top1(logits_of(model, adv), labels)[broken].sum())
