"""A model under a list of attacks, a batch at a time, each sample's worst case.

    outcome = suite.run(model, images, labels, seeds, attacks, settings, source=None)
    facts = suite.merge([outcome.facts, ...])

model: images [B,3,H,W] float32 in [0,1] -> logits [B,C] float32, in eval mode. seeds: int64 [B], a sample's own: its outcome does
not depend on the batch it stands in, nor on the world size. attacks: names of `attacks.ATTACKS`, run in this order, each on the
samples that are classified correctly and still stand. settings: `state.Settings` (eps as a float, norm, iters, restarts, queries, targets).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import losses
from ..errors import UserError
from . import registry
from .state import AttackSettings, AttackState, Classifier, logits_of
from .threat_model import perturbation_size


@dataclass
class AttackFacts:
    """What a batch's attacks did, as numbers that add up over batches and ranks (`merge`) and fit into JSON (`dataclasses.asdict`)."""

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
    clean_prediction: Tensor  # int64 [B]
    broken_by: list[str | None]  # the attack that a sample fell to; None: stands, or was wrong without attack
    prediction: Tensor  # int64 [B]: of `adv`, by the forward pass of the attack itself
    adv: Tensor  # [B,3,H,W]: misclassified where broken, else of the last attack's largest loss; the clean image where never attacked
    facts: AttackFacts

    @property
    def robust(self) -> Tensor:
        """bool [B]: correct without attack and under every one."""
        return self.clean & torch.tensor([b is None for b in self.broken_by], device=self.clean.device)


def defined_attacks(names: Sequence[str], n_classes: int) -> tuple[list[str], dict[str, str]]:
    """The attacks of `names` that exist for so many classes, in their order, and why each of the others does not.

    Raises UserError for an unknown name.
    """
    for name in names:
        registry.find_attack(name)
    reasons = {name: registry.not_defined(name, n_classes) for name in names}
    ran = [name for name, reason in reasons.items() if reason is None]
    return ran, {name: reason for name, reason in reasons.items() if reason is not None}


def run_attacks(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    seeds: Tensor,
    attacks: Sequence[str],
    settings: AttackSettings,
    source: Classifier | None = None,
) -> Outcome:
    """Set the attacks on a batch. source: the other model of `transfer`, with the same classes.

    Raises UserError for images that are not float32 in [0,1], an unknown attack, labels beyond the logits, or half-precision logits.
    """
    functions = {name: registry.find_attack(name) for name in attacks}
    check_images(images)
    with torch.no_grad():
        logits = logits_of(model, images)
    n_classes = logits.shape[1]
    if labels.min() < 0 or labels.max() >= n_classes:
        raise UserError(
            f"labels: {int(labels.max())} is beyond the model's {n_classes} classes; give it the class names of these labels"
        )
    prediction = logits.argmax(1)
    clean = prediction == labels
    bad = ~logits.isfinite().all(1)
    adv, final, broken_by = images.clone(), prediction.clone(), [None] * len(labels)
    stands = clean & ~bad
    broken, seconds, queries, skipped = {}, {}, {}, {}
    for name, attack in functions.items():
        reason = registry.not_defined(name, n_classes)
        if reason:
            skipped[name] = reason
            continue
        rows, began = stands.nonzero().flatten(), time.monotonic()
        state = AttackState(model, images[rows], labels[rows], seeds[rows], settings, source)
        if len(rows):
            attack(state)
        adv[rows], final[rows] = state.adv, state.prediction
        bad[rows] |= state.not_finite
        fallen = rows[state.broken]
        stands[fallen] = False
        for i in fallen.tolist():
            broken_by[i] = name
        broken[name], queries[name] = len(fallen), state.queries
        seconds[name] = time.monotonic() - began  # the counts above have waited for the device
    delta, attacked = adv - images, clean.nonzero().flatten()
    bad |= ~adv.flatten(1).isfinite().all(1)
    facts = AttackFacts(
        n=len(labels),
        attacked=len(attacked),
        largest_perturbation=float(perturbation_size(delta, settings.norm).max()),
        lowest_pixel=float(adv.min()),
        highest_pixel=float(adv.max()),
        not_finite=int(bad.sum()),
        zero_gradient_ce=zero_gradients(model, images[attacked], labels[attacked], losses.cross_entropy),
        zero_gradient_dlr=zero_gradients(model, images[attacked], labels[attacked], losses.dlr)
        if n_classes >= 3
        else None,
        taken_back=_taken_back(model, adv, labels, clean & ~stands),
        broken=broken,
        seconds=seconds,
        queries=queries,
        skipped=skipped,
    )
    return Outcome(clean, prediction, broken_by, final, adv, facts)


def merge(facts: Sequence[AttackFacts]) -> AttackFacts:
    """The facts of several batches (or ranks) of the same run as one."""

    def over(how, name):
        values = [v for v in (getattr(f, name) for f in facts) if v is not None]
        return how(values) if values else None

    def added(name):
        return {k: sum(getattr(f, name).get(k, 0) for f in facts) for f in facts for k in getattr(f, name)}

    return AttackFacts(
        **{
            name: over(sum, name)
            for name in ("n", "attacked", "not_finite", "zero_gradient_ce", "zero_gradient_dlr", "taken_back")
        },
        largest_perturbation=over(max, "largest_perturbation"),
        lowest_pixel=over(min, "lowest_pixel"),
        highest_pixel=over(max, "highest_pixel"),
        **{name: added(name) for name in ("broken", "seconds", "queries")},
        skipped={k: v for f in facts for k, v in f.skipped.items()},
    )


def check_images(images: Tensor) -> None:
    """Raises UserError unless images are float32 in [0,1]: eps is a size on that scale, and the model normalises by itself."""
    if images.dtype != torch.float32:
        raise UserError(f"images: {images.dtype} instead of float32; an attack of 1/255 does not survive less")
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):
        raise UserError(
            f"images: values from {low:.4g} to {high:.4g}, not within [0,1]; pass plain pixels / 255 and normalise inside the model"
        )


def zero_gradients(
    model: Classifier, images: Tensor, labels: Tensor, loss_fn: Callable[[Tensor, Tensor], Tensor]
) -> int:
    """How many of the samples have a gradient of the loss that is zero in every pixel: no gradient-based attack moves them."""
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
