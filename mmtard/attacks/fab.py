"""FAB-T, the targeted fast adaptive boundary attack.

Croce & Hein, ICML 2020, "Minimally distorted adversarial examples with a fast adaptive boundary attack".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..losses import true_class
from .fused import fusible
from .pgd import input_gradient
from .pursuit import Aim, Pursuit, at_targets
from .state import AttackState
from .threat_model import perturbation_size, random_start

# Bias towards the clean image, overshoot, step back: the authors' values.
_ALPHA_MAX, _ETA, _BETA = 0.1, 1.05, 0.9
_CLOSED = 1e-6  # share of a gap that may stay open: float32 sums no finer
_NEWTON_STEPS = 50


@dataclass(frozen=True)
class _Walk:
    x: Tensor  # [R,3,H,W]: the iterate, inside the eps ball or not


def fab_t(state: AttackState) -> None:
    """Walk to the linearised decision boundary, towards each of the highest other classes of the clean image in turn.

    A sample falls when a misclassified iterate lies within eps, and is then asked no more; one that lies beyond is
    shrunk. The first restart starts at the image.
    """
    at_targets(state, _walk)


def _walk(state: AttackState, rows: Tensor, aim: Aim) -> None:
    s, pursuit = state.settings, Pursuit(state, rows)

    def begin() -> _Walk:
        clean, restarted = pursuit.images, aim.restarted[rows]
        if not bool(restarted.any()):
            return _Walk(clean)
        return _Walk(
            torch.where(restarted.view(-1, 1, 1, 1), random_start(clean, aim.seeds[rows], s.norm, s.eps / 2), clean)
        )

    pursuit.run(_Walk, begin, lambda walk, _: _advance(pursuit, walk.x, aim), s.iters)


def _advance(pursuit: Pursuit, x: Tensor, aim: Aim) -> _Walk:
    s, clean, labels = pursuit.state.settings, pursuit.images, pursuit.state.labels[pursuit.rows]
    gap, gradient = _to_boundary(pursuit.state, x, labels, aim.targets[pursuit.rows])
    # The hyperplane <gradient, z - x> = gap, reached from the iterate and from the clean image.
    d1 = project_to_hyperplane(x, gradient, gap, s.norm)
    d2 = project_to_hyperplane(clean, gradient, _gap_from_clean(gap, gradient, x, clean), s.norm)
    x, size = _overshot(x, clean, d1, d2, s.norm)
    with torch.no_grad():
        logits, _ = pursuit.observe(x, allowed=size <= s.eps)
    return _Walk(_stepped_back(logits.argmax(1) != labels, x, clean))


@fusible
def _gap_from_clean(gap: Tensor, gradient: Tensor, x: Tensor, clean: Tensor) -> Tensor:
    return gap + (gradient * (x - clean)).flatten(1).sum(1)


@fusible
def _overshot(x: Tensor, clean: Tensor, d1: Tensor, d2: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    """A little beyond the hyperplane, between the two points on it, and the distance from the clean image."""
    a1, a2 = (perturbation_size(d, norm).clamp_min(1e-8) for d in (d1, d2))
    alpha = (a1 / (a1 + a2)).clamp(max=_ALPHA_MAX).view(-1, 1, 1, 1)
    x = ((1 - alpha) * (x + _ETA * d1) + alpha * (clean + _ETA * d2)).clamp(0, 1)
    return x, perturbation_size(x - clean, norm)


@fusible
def _stepped_back(adversarial: Tensor, x: Tensor, clean: Tensor) -> Tensor:
    return torch.where(adversarial.view(-1, 1, 1, 1), clean + _BETA * (x - clean), x)


def _to_boundary(state: AttackState, x: Tensor, labels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """z_y - z_t [R], which a step must remove, and the gradient [R,3,H,W] of z_t - z_y."""

    def lead(images: Tensor) -> Tensor:
        logits = state.logits(images)
        return true_class(logits, targets) - true_class(logits, labels)

    gradient, value = input_gradient(lead, x)
    return -value, gradient


def project_to_hyperplane(x: Tensor, normal: Tensor, gap: Tensor, norm: str) -> Tensor:
    """The smallest d (L-inf or L2) with <normal, d> = gap and 0 <= x + d <= 1; to the range's edge where none has.

    x, normal [R,...], gap [R] -> d [R,...]. Both norms share one form: coordinate i moves by min(t v_i, room_i) in
    the direction that closes the gap (v_i = 1 for L-inf, |normal_i| for L2). The gap closed is increasing, concave and
    piecewise linear in t, so that Newton's method from t = 0 never overshoots and ends on the very segment, where the
    authors sort all coordinates: on CIFAR-10's photographs after two or three steps of a sample, four passes over the
    pixels of a batch, of which the last finds no gap open.
    """
    direction, room, pull = _directions(gap, x, normal)
    need, t = gap.abs(), torch.zeros_like(gap)
    for _ in range(_NEWTON_STEPS):
        t, goes_on = _newton_step(t, need, pull, room, norm)
        if not bool(goes_on.any()):
            break
    return _displacement(t, pull, room, direction, norm).view_as(x)


@fusible
def _directions(gap: Tensor, x: Tensor, normal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each coordinate: the direction that closes the gap, how far it may go, and what a unit of it closes."""
    # No comparison of large tensors: on a CPU it costs as much as ten products.
    flat = x.flatten(1)
    direction = normal.flatten(1).sign() * (1 - 2 * (gap < 0).to(normal.dtype))[:, None]
    return direction, 0.5 + direction * (0.5 - flat), normal.flatten(1).abs()  # room: up to 1, or down to 0


@fusible
def _newton_step(t: Tensor, need: Tensor, pull: Tensor, room: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    """The next t, and whether it goes on: [R]."""
    moved = _moved(t, pull, room, norm)
    short = need - (pull * moved).sum(1)
    slope = ((pull * pull if norm == "l2" else pull) * (room - moved).sign()).sum(1)  # of those that move still
    goes_on = (short > _CLOSED * need) & (slope > 0)
    return torch.where(goes_on, t + short / slope.clamp_min(1e-30), t), goes_on


@fusible
def _displacement(t: Tensor, pull: Tensor, room: Tensor, direction: Tensor, norm: str) -> Tensor:
    return _moved(t, pull, room, norm) * direction


def _moved(t: Tensor, pull: Tensor, room: Tensor, norm: str) -> Tensor:
    return torch.minimum(t[:, None] * pull if norm == "l2" else t[:, None], room)
