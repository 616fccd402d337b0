"""Projected gradient descent on the input: `pgd`, and the worst of several adversarial batches."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .threat_model import ascent, project, random_start

LossFn = Callable[[Tensor], Tensor]


def pgd(
    loss_fn: LossFn,
    images: Tensor,
    *,
    norm: str,
    eps: float,
    step_size: float,
    steps: int,
    seeds: Tensor | None = None,
    momentum: float = 0.0,
) -> Tensor:
    """Projected gradient ascent (Madry et al., ICLR 2018): `steps` forward and input-gradient passes, nothing more.

    seeds: int64 [B], each sample's random start; None starts at the images. momentum: the direction of a step is
    ascent(m) with m <- momentum * m + ascent(g). (The published MMT-ARD code keeps only the sign of its velocity, so that its 0.9
    has no effect under L-inf: momentum 0 reproduces it.) Returns the last iterate.
    """
    adv = images if seeds is None else random_start(images, seeds, norm, eps)
    velocity = torch.zeros_like(images)
    for _ in range(steps):
        gradient, _ = input_gradient(loss_fn, adv)
        velocity = momentum * velocity + ascent(gradient, norm)
        adv = project(adv + step_size * ascent(velocity, norm), images, norm, eps)
    return adv


@torch.no_grad()
def worst_of(loss_fn: LossFn, candidates: Iterable[Tensor]) -> Tensor:
    """Of several adversarial batches [B,C,H,W], each sample's image of largest loss (the first of equals): one forward a batch."""
    best = best_loss = None
    for images in candidates:
        loss = loss_fn(images)
        better = torch.ones_like(loss, dtype=torch.bool) if best is None else loss > best_loss
        best = images if best is None else torch.where(better.view((-1,) + (1,) * (images.dim() - 1)), images, best)
        best_loss = loss if best_loss is None else torch.where(better, loss, best_loss)
    return best


def input_gradient(loss_fn: LossFn, images: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        images = images.detach().requires_grad_(True)
        loss = loss_fn(images)
        return torch.autograd.grad(loss.sum(), images)[0].detach(), loss.detach()
