"""Auto-PGD (Croce & Hein, ICML 2020): PGD that chooses its own step size."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .fused import fusible
from .inputs import check_batch, check_count, check_eps
from .pgd import LossFn, input_gradient
from .threat_model import Norm, ascent, check_norm, into_ball, random_start

_ALPHA, _RHO = 0.75, 0.75  # the weight of the new step beside momentum; the share of steps that must gain


def apgd(
    loss_fn: LossFn, images: Tensor, *, norm: str | float, eps: float, steps: int, seeds: Tensor | None = None
) -> Tensor:
    """Auto-PGD (Croce & Hein, ICML 2020, algorithm 1): step size 2 eps, halved at checkpoints of no progress.

    Arguments as of `pgd`. One forward and input-gradient pass for each of `steps`, and one for the start. Returns each
    sample's iterate of largest loss.
    """
    climb = Apgd(norm, eps, steps)
    check_batch(images)
    walk = climb.begin(loss_fn, images, seeds)
    for k in range(steps):
        walk = climb.advance(walk, k, loss_fn, images)
    return walk.best


@dataclass(frozen=True)
class ApgdWalk:
    """Where APGD is with each of its samples."""

    x: Tensor  # [R,...]
    x_previous: Tensor
    gradient: Tensor
    loss: Tensor  # [R]
    best: Tensor  # the iterate of largest loss
    best_loss: Tensor
    best_gradient: Tensor
    step: Tensor  # [R]: the step size
    gains: Tensor  # [R]: iterations since the last checkpoint whose loss rose
    step_at_check: Tensor
    best_at_check: Tensor


class Apgd:
    """The iterations of APGD: `begin`, then `advance` for k = 0, 1, ..., steps - 1. Arguments as of `apgd`."""

    def __init__(self, norm: str | float, eps: float, steps: int):
        self.norm = check_norm(norm)
        self.eps = check_eps(eps, self.norm)
        check_count(steps, "steps")
        ends = sorted({0, *step_size_checkpoints(steps)})
        self._lengths = {end: end - last for last, end in zip(ends, ends[1:])}

    def begin(self, loss_fn: LossFn, images: Tensor, seeds: Tensor | None) -> ApgdWalk:
        """The walk at its random start, or at the images where there are no seeds."""
        x = images if seeds is None else random_start(images, seeds, self.norm, self.eps)
        gradient, loss = input_gradient(loss_fn, x)
        step = torch.full_like(loss, 2 * self.eps)
        return ApgdWalk(x, x, gradient, loss, x, loss, gradient, step, torch.zeros_like(loss), step, loss)

    def advance(self, walk: ApgdWalk, k: int, loss_fn: LossFn, images: Tensor) -> ApgdWalk:
        """The walk after iteration k, from 0."""
        shape = (-1,) + (1,) * (images.dim() - 1)
        a = _ALPHA if k else 1.0
        x = _climbed(walk.x, walk.x_previous, walk.gradient, walk.step, images, a, self.norm, self.eps)
        gradient, loss = input_gradient(loss_fn, x)
        best_loss, best, best_gradient = _better(loss, x, gradient, walk.best_loss, walk.best, walk.best_gradient)
        walk = replace(
            walk,
            x=x,
            x_previous=walk.x,
            gradient=gradient,
            loss=loss,
            best=best,
            best_loss=best_loss,
            best_gradient=best_gradient,
            gains=walk.gains + (loss > walk.loss),
        )
        return self._check(walk, self._lengths[k + 1], shape) if k + 1 in self._lengths else walk

    def _check(self, walk: ApgdWalk, length: int, shape: tuple[int, ...]) -> ApgdWalk:
        """A checkpoint, `length` iterations after the last: a sample that is stuck goes on from its best iterate with
        half the step."""
        no_gain = (walk.step == walk.step_at_check) & (walk.best_loss <= walk.best_at_check)
        stuck = (walk.gains < _RHO * length) | no_gain
        return replace(
            walk,
            x=torch.where(stuck.view(shape), walk.best, walk.x),
            gradient=torch.where(stuck.view(shape), walk.best_gradient, walk.gradient),
            loss=torch.where(stuck, walk.best_loss, walk.loss),
            step=torch.where(stuck, walk.step / 2, walk.step),
            gains=torch.zeros_like(walk.gains),
            step_at_check=walk.step,
            best_at_check=walk.best_loss,
        )


@fusible
def _climbed(
    x: Tensor, x_previous: Tensor, gradient: Tensor, step: Tensor, images: Tensor, a: float, norm: Norm, eps: float
) -> Tensor:
    """The next iterate: a step up, with the share 1 - a of the last one's momentum."""
    step = step.view((-1,) + (1,) * (x.dim() - 1))
    z = into_ball(x + step * ascent(gradient, norm), images, norm, eps)
    return into_ball(x + a * (z - x) + (1 - a) * (x - x_previous), images, norm, eps)


@fusible
def _better(
    loss: Tensor, x: Tensor, gradient: Tensor, best_loss: Tensor, best: Tensor, best_gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The largest loss, its iterate and gradient."""
    better = loss > best_loss
    pixels = better.view((-1,) + (1,) * (x.dim() - 1))
    return (
        torch.where(better, loss, best_loss),
        torch.where(pixels, x, best),
        torch.where(pixels, gradient, best_gradient),
    )


def step_size_checkpoints(steps: int) -> list[int]:
    """Iterations at which `apgd` may halve its step.

    w_j = ceil(p_j * steps) with p_0 = 0, p_1 = .22, p_{j+1} = p_j + max(p_j - p_{j-1} - .03, .06).
    """
    checkpoints, previous, p = [], 0, 22  # in hundredths: exact
    while p <= 100:
        checkpoints.append(-(-p * steps // 100))
        previous, p = p, p + max(p - previous - 3, 6)
    return checkpoints
