"""The attack inside training: what the `attack` section of a configuration makes of a batch."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..attacks.apgd import apgd
from ..attacks.fused import fusible
from ..attacks.pgd import LossFn, input_gradient, pgd, worst_of
from ..attacks.threat_model import random_start
from ..config import Attack
from ..seeding import derive_seeds

Forward = Callable[[Tensor], Tensor]


def perturb(attack: Attack, loss_fn: LossFn, images: Tensor, seeds: Tensor) -> Tensor:
    """The adversarial images of an `attack` section: maximises `loss_fn(images) -> [B]` inside the ball of
    radius `attack.eps` around `images`, into which `into_ball` of `attacks/threat_model.py` brings each step; N-FGSM's
    may leave it. `Attack.at` gives the section of an update, whose step is a number.

    With restarts, each sample keeps the images of its largest loss; the first restart's start is that of a single
    attack.
    """
    shared = dict(norm=attack.norm, eps=float(attack.eps), steps=attack.steps)

    if attack.algorithm == "nfgsm":
        return nfgsm(loss_fn, images, seeds, float(attack.eps), attack.noise)

    def once(seeds: Tensor | None) -> Tensor:
        if attack.algorithm == "apgd":
            return apgd(loss_fn, images, seeds=seeds, **shared)
        return pgd(loss_fn, images, seeds=seeds, step_size=float(attack.step_size), momentum=attack.momentum, **shared)

    if attack.restarts == 1:
        return once(seeds if attack.random_start else None)
    return worst_of(loss_fn, (once(derive_seeds(seeds, r) if r else seeds) for r in range(attack.restarts)))


def nfgsm(loss_fn: LossFn, images: Tensor, seeds: Tensor, eps: float, noise: float) -> Tensor:
    """One step of eps along the gradient's sign from a start uniform within noise * eps, cut to [0,1], not to a ball:
    x' = x + n + eps * sign(grad l(x + n)), n ~ U(-noise * eps, noise * eps).

    images [B,C,H,W] in [0,1], seeds int64 [B]. N-FGSM; de Jorge et al., "Make Some Noise: Reliable and Efficient
    Single-Step Adversarial Training", NeurIPS 2022, with noise 2.
    """
    start = random_start(images, seeds, "linf", min(noise * eps, 1.0))
    gradient, _ = input_gradient(loss_fn, start)
    return _one_step(start, gradient, eps)


@fusible
def _one_step(start: Tensor, gradient: Tensor, eps: float) -> Tensor:
    return (start + eps * gradient.sign()).clamp(0, 1)
