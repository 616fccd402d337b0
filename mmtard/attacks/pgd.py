"""Projected gradient descent on the input: `pgd`, and the worst of several adversarial batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..errors import UserError
from .fused import fusible
from .inputs import check_batch, check_count, check_eps, check_loss, check_positive
from .threat_model import ascent, check_norm, into_ball, random_start

LossFn = Callable[[Tensor], Tensor]  # images [B,...] -> one loss for each image, [B], with a gradient to the images


def pgd(
    loss_fn: LossFn,
    images: Tensor,
    *,
    norm: str | float,
    eps: float,
    step_size: float,
    steps: int,
    seeds: Tensor | None = None,
    momentum: float = 0.0,
) -> Tensor:
    """Projected gradient ascent on a loss (Madry et al., ICLR 2018): `steps` forward and input-gradient passes.

    loss_fn: images -> the loss of each, [B]. images: float [B,C,H,W] in [0,1]. norm: linf or l2, in any spelling that
    `check_norm` takes. eps, step_size: in units of [0,1] pixels. seeds: int64 [B], each sample's random start; None
    starts at the images. momentum: the direction of a step is ascent(m) with m <- momentum * m + ascent(g), 0 <=
    momentum < 1. (The published MMT-ARD code keeps only the sign of its velocity, so that its 0.9 has no effect under
    L-inf: momentum 0 reproduces it.) Returns the last iterate. Raises UserError for what does not fit; values of
    pixels are not looked at.
    """
    norm = check_norm(norm)
    eps, step_size = check_eps(eps, norm), check_positive(step_size, "step_size")
    check_batch(images)
    check_count(steps, "steps")
    if not 0 <= momentum < 1:
        raise UserError(f"momentum: {momentum} is not in [0,1); write 0 for none")
    adv = images if seeds is None else random_start(images, seeds, norm, eps)
    velocity = torch.zeros_like(images)
    for _ in range(steps):
        gradient, _ = input_gradient(loss_fn, adv)
        if momentum:
            adv, velocity = _carried(adv, velocity, gradient, images, momentum, norm, eps, step_size)
        else:
            adv = _stepped(adv, gradient, images, norm, eps, step_size)
    return adv


def pgd_step(loss_fn: LossFn, adv: Tensor, images: Tensor, *, norm: str, eps: float, step_size: float) -> Tensor:
    """The iterate after one step of `pgd` without momentum."""
    gradient, _ = input_gradient(loss_fn, adv)
    return _stepped(adv, gradient, images, norm, eps, step_size)


@fusible
def _stepped(adv: Tensor, gradient: Tensor, images: Tensor, norm: str, eps: float, step_size: float) -> Tensor:
    return _moved(adv, ascent(gradient, norm), images, norm, eps, step_size)


@fusible
def _carried(
    adv: Tensor,
    velocity: Tensor,
    gradient: Tensor,
    images: Tensor,
    momentum: float,
    norm: str,
    eps: float,
    step_size: float,
) -> tuple[Tensor, Tensor]:
    """The next iterate, and the velocity that led to it."""
    velocity = momentum * velocity + ascent(gradient, norm)
    return _moved(adv, velocity, images, norm, eps, step_size), velocity


def _moved(adv: Tensor, velocity: Tensor, images: Tensor, norm: str, eps: float, step_size: float) -> Tensor:
    return into_ball(adv + step_size * ascent(velocity, norm), images, norm, eps)


@torch.no_grad()
def worst_of(loss_fn: LossFn, candidates: Iterable[Tensor]) -> Tensor:
    """Of several adversarial batches [B,C,H,W], each sample's image of largest loss (the first of equals).

    One forward a batch. Raises UserError for no batch, or losses that are not [B].
    """
    batches = iter(candidates)
    best = next(batches, None)
    if best is None:
        raise UserError("candidates: no adversarial batch to choose from; give at least one")
    best_loss = loss_fn(best)
    check_loss(best_loss, best)
    for images in batches:
        loss = loss_fn(images)
        check_loss(loss, images)
        better = loss > best_loss
        best = torch.where(better.view((-1,) + (1,) * (images.dim() - 1)), images, best)
        best_loss = torch.where(better, loss, best_loss)
    return best


def input_gradient(loss_fn: LossFn, images: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of the summed losses to the images, [B,...], and the losses [B]; both detached, of the images' type.

    Raises UserError for a loss that is not [B], or that does not lead back to the images.
    """
    with torch.enable_grad():
        images = images.detach().requires_grad_(True)
        loss = loss_fn(images)
        check_loss(loss, images)
        gradient = None
        if loss.requires_grad:
            (gradient,) = torch.autograd.grad(loss.sum(), images, allow_unused=True)
    if gradient is None:
        raise UserError(
            "loss_fn: its losses have no gradient to the images; leave torch.no_grad, detach and numpy out of the model"
        )
    return gradient.detach(), loss.detach().to(images.dtype)
