"""Auto-PGD (Croce & Hein, ICML 2020): PGD that chooses its own step size."""

from __future__ import annotations

import torch
from torch import Tensor

from .inputs import check_batch, check_count, check_eps
from .pgd import LossFn, input_gradient
from .threat_model import ascent, check_norm, project, random_start

_ALPHA, _RHO = 0.75, 0.75  # the weight of the new step beside momentum; the share of steps that must gain


def apgd(
    loss_fn: LossFn, images: Tensor, *, norm: str | float, eps: float, steps: int, seeds: Tensor | None = None
) -> Tensor:
    """Auto-PGD (Croce & Hein, ICML 2020, algorithm 1): step size 2 eps, halved at checkpoints of no progress.

    Arguments as of `pgd`. One forward and input-gradient pass for each of `steps`, and one for the start. Returns each
    sample's iterate of largest loss.
    """
    norm = check_norm(norm)
    eps = check_eps(eps, norm)
    check_batch(images)
    check_count(steps, "steps")
    shape = (-1,) + (1,) * (images.dim() - 1)
    x = images if seeds is None else random_start(images, seeds, norm, eps)
    gradient, loss = input_gradient(loss_fn, x)
    best, best_loss, best_gradient = x, loss, gradient
    x_previous, step = x, torch.full_like(loss, 2 * eps)
    gains, last_check, step_at_check, best_at_check = torch.zeros_like(loss), 0, step.clone(), loss.clone()
    checkpoints = step_size_checkpoints(steps)
    for k in range(steps):
        z = project(x + step.view(shape) * ascent(gradient, norm), images, norm, eps)
        a = _ALPHA if k else 1.0
        x, x_previous = project(x + a * (z - x) + (1 - a) * (x - x_previous), images, norm, eps), x
        previous_loss = loss
        gradient, loss = input_gradient(loss_fn, x)
        gains += loss > previous_loss
        better = (loss > best_loss).view(shape)
        best, best_gradient = torch.where(better, x, best), torch.where(better, gradient, best_gradient)
        best_loss = torch.maximum(loss, best_loss)
        if k + 1 in checkpoints:
            stuck = (gains < _RHO * (k + 1 - last_check)) | ((step == step_at_check) & (best_loss <= best_at_check))
            step_at_check, best_at_check = step.clone(), best_loss.clone()
            # A sample that is stuck goes on from its best iterate with half the step.
            step = torch.where(stuck, step / 2, step)
            x = torch.where(stuck.view(shape), best, x)
            gradient = torch.where(stuck.view(shape), best_gradient, gradient)
            loss = torch.where(stuck, best_loss, loss)
            gains, last_check = torch.zeros_like(gains), k + 1
    return best


def step_size_checkpoints(steps: int) -> list[int]:
    """Iterations at which `apgd` may halve its step.

    w_j = ceil(p_j * steps) with p_0 = 0, p_1 = .22, p_{j+1} = p_j + max(p_j - p_{j-1} - .03, .06).
    """
    checkpoints, previous, p = [], 0, 22  # in hundredths: exact
    while p <= 100:
        checkpoints.append(-(-p * steps // 100))
        previous, p = p, p + max(p - previous - 3, 6)
    return checkpoints
