"""The set of allowed perturbations: an L-inf or L2 ball around each image, cut to [0, 1]."""

from __future__ import annotations

from torch import Tensor

from ..seeding import GOLDEN, sample_uniform


def random_start(images: Tensor, seeds: Tensor, norm: str, eps: float) -> Tensor:
    """A start inside the eps ball and [0,1], from each sample's seed: uniform in the L-inf ball; a random direction with
    uniform radius for L2."""
    delta = 2 * sample_uniform(seeds, images.shape[1:]) - 1
    if norm == "l2":
        radius = sample_uniform(seeds ^ GOLDEN, (1, 1, 1))
        delta = delta / l2_norm(delta) * radius
    return (images + eps * delta).clamp(0, 1)


def project(adv: Tensor, images: Tensor, norm: str, eps: float) -> Tensor:
    """The nearest point of the eps ball around `images` (L-inf or L2 over all pixels), then clamped to [0,1]."""
    delta = adv - images
    delta = delta.clamp(-eps, eps) if norm == "linf" else delta * (eps / l2_norm(delta)).clamp(max=1.0)
    return (images + delta).clamp(0, 1)


def ascent(gradient: Tensor, norm: str) -> Tensor:
    """The steepest-ascent direction of unit size: sign(g) for L-inf, g / ||g||_2 for L2."""
    return gradient.sign() if norm == "linf" else gradient / l2_norm(gradient)


def l2_norm(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).clamp_min(1e-12).view((-1,) + (1,) * (x.dim() - 1))


def perturbation_size(delta: Tensor, norm: str) -> Tensor:
    """The size of each perturbation over all its pixels, L-inf or L2: [B,...] -> [B]."""
    flat = delta.flatten(1)
    return flat.abs().amax(1) if norm == "linf" else flat.norm(dim=1)
