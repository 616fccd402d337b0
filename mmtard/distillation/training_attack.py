"""The attack inside training: what the `attack` section of a configuration makes of a batch."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..attacks.apgd import apgd
from ..attacks.pgd import LossFn, pgd, worst_of
from ..config import Attack
from ..seeding import derive_seeds

Forward = Callable[[Tensor], Tensor]


def perturb(attack: Attack, loss_fn: LossFn, images: Tensor, seeds: Tensor) -> Tensor:
    """The adversarial images of an `attack` section: maximises `loss_fn(images) -> [B]` inside the ball of
    radius `attack.eps` around `images`, into which `project` of `attacks/threat_model.py` brings each step.

    With restarts, each sample keeps the images of its largest loss; the first restart's start is that of a single
    attack.
    """
    shared = dict(norm=attack.norm, eps=float(attack.eps), steps=attack.steps)

    def once(seeds: Tensor | None) -> Tensor:
        if attack.algorithm == "apgd":
            return apgd(loss_fn, images, seeds=seeds, **shared)
        return pgd(loss_fn, images, seeds=seeds, step_size=float(attack.step_size), momentum=attack.momentum, **shared)

    if attack.restarts == 1:
        return once(seeds if attack.random_start else None)
    return worst_of(loss_fn, (once(derive_seeds(seeds, r) if r else seeds) for r in range(attack.restarts)))
