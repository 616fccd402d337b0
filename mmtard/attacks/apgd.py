"""Auto-PGD (Croce & Hein, ICML 2020): PGD that chooses its own step size."""

import torch
from torch import Tensor

from .pgd import LossFn, input_gradient
from .threat_model import ascent, project, random_start


def apgd(loss_fn: LossFn, images: Tensor, *, norm: str, eps: float, steps: int, seeds: Tensor | None = None) -> Tensor:
    """Auto-PGD (Croce & Hein, ICML 2020, algorithm 1): step size 2 eps, halved at checkpoints of no progress.

    One forward and input-gradient pass for each of `steps` and one for the start. Returns each sample's iterate of largest loss.
    """
    shape = (-1,) + (1,) * (images.dim() - 1)
    alpha, rho = 0.75, 0.75
    x = images if seeds is None else random_start(images, seeds, norm, eps)
    gradient, loss = input_gradient(loss_fn, x)
    best, best_loss, best_gradient = x, loss, gradient
    x_previous, step = x, torch.full_like(loss, 2 * eps)
    gains, last_check, step_at_check, best_at_check = torch.zeros_like(loss), 0, step.clone(), loss.clone()
    checks = step_size_checkpoints(steps)
    for k in range(steps):
        z = project(x + step.view(shape) * ascent(gradient, norm), images, norm, eps)
        a = alpha if k else 1.0
        x, x_previous = project(x + a * (z - x) + (1 - a) * (x - x_previous), images, norm, eps), x
        previous_loss = loss
        gradient, loss = input_gradient(loss_fn, x)
        gains += loss > previous_loss
        better = (loss > best_loss).view(shape)
        best, best_gradient = torch.where(better, x, best), torch.where(better, gradient, best_gradient)
        best_loss = torch.maximum(loss, best_loss)
        if k + 1 in checks:
            stuck = (gains < rho * (k + 1 - last_check)) | ((step == step_at_check) & (best_loss <= best_at_check))
            step_at_check, best_at_check = step.clone(), best_loss.clone()
            step = torch.where(stuck, step / 2, step)
            x, gradient = (torch.where(stuck.view(shape), b, now) for b, now in ((best, x), (best_gradient, gradient)))
            loss = torch.where(stuck, best_loss, loss)
            gains, last_check = torch.zeros_like(gains), k + 1
    return best


def step_size_checkpoints(steps: int) -> list[int]:
    """Iterations at which apgd may halve its step: w_j = ceil(p_j * steps), p_0 = 0, p_1 = .22, p_{j+1} = p_j + max(p_j - p_{j-1} - .03, .06)."""
    out, previous, p = [], 0, 22  # in hundredths: exact
    while p <= 100:
        out.append(-(-p * steps // 100))
        previous, p = p, p + max(p - previous - 3, 6)
    return out
