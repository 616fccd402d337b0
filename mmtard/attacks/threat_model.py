"""The set of allowed perturbations: an L-inf or L2 ball around each image, cut to [0, 1]."""

from __future__ import annotations

import math
import re
from numbers import Real
from typing import Literal

from torch import Tensor

from ..errors import UserError
from ..seeding import GOLDEN, sample_uniform
from .fused import fusible
from .inputs import check_batch, check_eps, check_per_sample, check_radius

Norm = Literal["linf", "l2"]


def check_norm(norm: object) -> Norm:
    """The norm in mmtard's own spelling. This is the one place that knows the norms.

    Takes what other libraries of the field write: "linf", "Linf", "L-inf", "l_inf", "inf", "l2", "L2", "2", and the
    numbers 2, math.inf, numpy.inf. Raises UserError for any other.
    """
    if norm in ("linf", "l2"):
        return norm
    if isinstance(norm, str):
        spelled = re.fullmatch(r"(?:l[\s_-]?)?(inf|infinity|infty|∞|2|2\.0)", norm.strip().lower())
        if spelled:
            return "l2" if spelled[1].startswith("2") else "linf"
    elif isinstance(norm, Real) and norm in (2, math.inf):
        return "l2" if norm == 2 else "linf"
    raise UserError(f"norm: {norm!r} is not known; write 'linf' or 'l2'")


def random_start(images: Tensor, seeds: Tensor, norm: str | float, eps: float) -> Tensor:
    """A start inside the eps ball and [0,1]: uniform in the L-inf ball; a random direction with uniform radius for L2.

    images: float [B,C,H,W] in [0,1]. seeds: int64 [B]; a sample's start depends on its own seed alone. Raises
    UserError for an unknown norm, a negative eps, and images or seeds of another kind.
    """
    norm = check_norm(norm)
    eps = check_eps(eps, norm)
    check_batch(images)
    check_per_sample(seeds, images, "seeds")
    return _started(images, seeds, norm, eps)


@fusible
def _started(images: Tensor, seeds: Tensor, norm: Norm, eps: float) -> Tensor:
    delta = 2 * sample_uniform(seeds, images.shape[1:]) - 1
    if norm == "l2":
        radius = sample_uniform(seeds ^ GOLDEN, (1,) * (images.dim() - 1))
        delta = delta / l2_norm(delta) * radius
    return (images + eps * delta).clamp(0, 1)


def project(adv: Tensor, images: Tensor, norm: str | float, eps: float) -> Tensor:
    """Project `adv` onto the eps ball around `images`, then onto [0, 1].

    adv, images: float [B,C,H,W], images in [0,1]. eps: radius >= 0 in the same units; L2 is over all pixels of an
    image. Raises UserError for an unknown norm, a negative eps, and tensors of different shapes.
    """
    norm, eps = check_norm(norm), check_radius(eps)
    check_batch(images)
    if adv.shape != images.shape:
        raise UserError(f"adv: shape {list(adv.shape)} beside images of {list(images.shape)}; give two of one shape")
    return into_ball(adv, images, norm, eps)


def into_ball(adv: Tensor, images: Tensor, norm: str, eps: float) -> Tensor:
    """`project` of what has been checked."""
    delta = adv - images
    delta = delta.clamp(-eps, eps) if norm == "linf" else delta * (l2_norm(delta).reciprocal() * eps).clamp(max=1.0)
    return (images + delta).clamp(0, 1)


def ascent(gradient: Tensor, norm: str | float) -> Tensor:
    """The steepest-ascent direction of unit size: sign(g) for L-inf, g / ||g||_2 for L2."""
    return gradient.sign() if check_norm(norm) == "linf" else gradient / l2_norm(gradient)


def l2_norm(x: Tensor) -> Tensor:
    """The L2 norm of each sample over all its pixels, at least 1e-12: [B,...] -> [B,1,...], to divide by."""
    return x.flatten(1).norm(dim=1).clamp_min(1e-12).view((-1,) + (1,) * (x.dim() - 1))


def perturbation_size(delta: Tensor, norm: str | float) -> Tensor:
    """The size of each perturbation over all its pixels, L-inf or L2: [B,...] -> [B]."""
    flat = delta.flatten(1)
    return flat.abs().amax(1) if check_norm(norm) == "linf" else flat.norm(dim=1)
