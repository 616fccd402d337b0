"""Adversarial images in pixel space: `pgd` and `apgd`.

Every attack takes `loss_fn(images) -> per-sample losses [B]` and clean images [B,C,H,W] float32 in [0,1], and returns
images of the same shape inside the eps ball and [0,1]. Losses are summed, so that a sample's perturbation does not depend
on the batch it stands in. Perturbation, projection and clamp stay in float32; only `loss_fn` may run in lower precision.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

LossFn = Callable[[Tensor], Tensor]
_GOLDEN, _MIX1, _MIX2 = -7046029254386353131, -4658895280553007687, -7723592293110705685  # splitmix64's constants as int64


def sample_uniform(seeds: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Uniform numbers in [0,1) that depend on each sample's own seed alone: seeds int64 [B] -> float32 [B, *shape].

    splitmix64 (Steele et al., OOPSLA 2014) in counter mode, in integer arithmetic: the same bits on every device, at every
    batch composition and world size. The upper 24 bits become the number.
    """
    counter = torch.arange(1, 1 + torch.Size(shape).numel(), device=seeds.device, dtype=torch.int64)
    z = _mix(seeds[:, None] + counter[None, :] * _GOLDEN)
    return (_shift(z, 40).to(torch.float32) * 2.0**-24).reshape(len(seeds), *shape)


def derive_seeds(seeds: Tensor, k: int) -> Tensor:
    """Each sample's seed of its k-th restart, target or draw: int64 [B] -> int64 [B], unrelated for any two k."""
    step = torch.full_like(seeds, _MIX1)  # not the step of sample_uniform, so that no seed is one of its numbers; wraps as int64 does
    return _mix(seeds + (k + 1) * step)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _MIX1
    z = (z ^ _shift(z, 27)) * _MIX2
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)  # logical: torch shifts int64 arithmetically


def random_start(images: Tensor, seeds: Tensor, norm: str, eps: float) -> Tensor:
    """A start inside the eps ball and [0,1], from each sample's seed: uniform in the L-inf ball; a random direction with
    uniform radius for L2."""
    delta = 2 * sample_uniform(seeds, images.shape[1:]) - 1
    if norm == "l2":
        radius = sample_uniform(seeds ^ _GOLDEN, (1, 1, 1))
        delta = delta / _l2(delta) * radius
    return (images + eps * delta).clamp(0, 1)


def project(adv: Tensor, images: Tensor, norm: str, eps: float) -> Tensor:
    """The nearest point of the eps ball around `images` (L-inf or L2 over all pixels), then clamped to [0,1]."""
    delta = adv - images
    delta = delta.clamp(-eps, eps) if norm == "linf" else delta * (eps / _l2(delta)).clamp(max=1.0)
    return (images + delta).clamp(0, 1)


def ascent(gradient: Tensor, norm: str) -> Tensor:
    """The steepest-ascent direction of unit size: sign(g) for L-inf, g / ||g||_2 for L2."""
    return gradient.sign() if norm == "linf" else gradient / _l2(gradient)


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
        gradient, _ = _gradient(loss_fn, adv)
        velocity = momentum * velocity + ascent(gradient, norm)
        adv = project(adv + step_size * ascent(velocity, norm), images, norm, eps)
    return adv


def apgd(loss_fn: LossFn, images: Tensor, *, norm: str, eps: float, steps: int, seeds: Tensor | None = None) -> Tensor:
    """Auto-PGD (Croce & Hein, ICML 2020, algorithm 1): step size 2 eps, halved at checkpoints of no progress.

    One forward and input-gradient pass for each of `steps` and one for the start. Returns each sample's iterate of largest loss.
    """
    shape = (-1,) + (1,) * (images.dim() - 1)
    alpha, rho = 0.75, 0.75
    x = images if seeds is None else random_start(images, seeds, norm, eps)
    gradient, loss = _gradient(loss_fn, x)
    best, best_loss, best_gradient = x, loss, gradient
    x_previous, step = x, torch.full_like(loss, 2 * eps)
    gains, last_check, step_at_check, best_at_check = torch.zeros_like(loss), 0, step.clone(), loss.clone()
    checks = checkpoints(steps)
    for k in range(steps):
        z = project(x + step.view(shape) * ascent(gradient, norm), images, norm, eps)
        a = alpha if k else 1.0
        x, x_previous = project(x + a * (z - x) + (1 - a) * (x - x_previous), images, norm, eps), x
        previous_loss = loss
        gradient, loss = _gradient(loss_fn, x)
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


@torch.no_grad()
def worst(loss_fn: LossFn, candidates: Iterable[Tensor]) -> Tensor:
    """Of several adversarial batches [B,C,H,W], each sample's image of largest loss (the first of equals): one forward a batch."""
    best = best_loss = None
    for images in candidates:
        loss = loss_fn(images)
        better = torch.ones_like(loss, dtype=torch.bool) if best is None else loss > best_loss
        best = images if best is None else torch.where(better.view((-1,) + (1,) * (images.dim() - 1)), images, best)
        best_loss = loss if best_loss is None else torch.where(better, loss, best_loss)
    return best


def checkpoints(steps: int) -> list[int]:
    """Iterations at which apgd may halve its step: w_j = ceil(p_j * steps), p_0 = 0, p_1 = .22, p_{j+1} = p_j + max(p_j - p_{j-1} - .03, .06)."""
    out, previous, p = [], 0, 22  # in hundredths: exact
    while p <= 100:
        out.append(-(-p * steps // 100))
        previous, p = p, p + max(p - previous - 3, 6)
    return out


def _gradient(loss_fn: LossFn, images: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        images = images.detach().requires_grad_(True)
        loss = loss_fn(images)
        return torch.autograd.grad(loss.sum(), images)[0].detach(), loss.detach()


def _l2(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).clamp_min(1e-12).view((-1,) + (1,) * (x.dim() - 1))
