"""Square (Andriushchenko et al., ECCV 2020), L-inf: random search by squares, asking the model for its scores alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import losses
from ..errors import UserError
from ..seeding import derive_seeds, sample_uniform
from .pursuit import Pursuit
from .state import AttackState

_P_INIT = 0.8  # share of the pixels that the first squares cover
# Queries after which the share halves, as in AutoAttack (not rescaled to the budget).
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def square(state: AttackState) -> None:
    """Random search with at most `queries` forward passes a sample and restart. Raises UserError for L2.

    Position and colours of each square come from the sample's own seed, not the batch's as in the authors' code; a
    sample that falls is asked about no more.
    """
    s = state.settings
    if s.norm != "linf":
        raise UserError(f"attacks: 'square' is written for linf, not {s.norm}; leave it out")
    with torch.no_grad():
        for restart, rows in state.restarts():
            _search(state, rows, restart)


@dataclass(frozen=True)
class _Walk:
    seeds: Tensor  # int64 [R]: of this restart
    best: Tensor  # [R,3,H,W]: the iterate of the lowest margin
    lowest: Tensor  # [R]


def _search(state: AttackState, rows: Tensor, restart: int) -> None:
    eps, (_, c, h, w) = state.settings.eps, state.images.shape
    pursuit = Pursuit(state, rows, lambda logits, labels, _: -losses.margin(logits, labels))

    def begin() -> _Walk:
        seeds = derive_seeds(state.seeds[rows], restart)
        best = (pursuit.images + eps * _signs(seeds, (c, 1, w))).clamp(0, 1)  # vertical stripes
        return _Walk(seeds, best, -pursuit(best))

    def advance(walk: _Walk, i: int) -> _Walk:
        draw, clean = derive_seeds(walk.seeds, i + 1), pursuit.images
        proposal = torch.where(
            _window(draw, h, w, side(i, h, w)), (clean + eps * _signs(draw, (c, 1, 1))).clamp(0, 1), walk.best
        )
        margin = -pursuit(proposal)
        better = margin < walk.lowest
        best = torch.where(better.view(-1, 1, 1, 1), proposal, walk.best)
        return _Walk(walk.seeds, best, torch.minimum(margin, walk.lowest))

    pursuit.run(_Walk, begin, advance, state.settings.queries - 1)


def side(i: int, h: int, w: int) -> int:
    """Side in pixels of the i-th square (from 0) on images of h x w."""
    p = _P_INIT / 2 ** sum(i > n for n in _HALVINGS)
    return min(max(round((p * h * w) ** 0.5), 1), h, w)


def _window(seeds: Tensor, h: int, w: int, side: int) -> Tensor:
    """Where each sample's square lies, uniform over all that fit: bool [R,1,H,W]."""
    u = sample_uniform(seeds, (2,))
    top, left = ((u[:, k] * (n - side + 1)).long().view(-1, 1, 1, 1) for k, n in ((0, h), (1, w)))
    y, x = torch.arange(h, device=seeds.device).view(1, 1, h, 1), torch.arange(w, device=seeds.device).view(1, 1, 1, w)
    return (y >= top) & (y < top + side) & (x >= left) & (x < left + side)


def _signs(seeds: Tensor, shape: tuple[int, ...]) -> Tensor:
    return (sample_uniform(derive_seeds(seeds, 0), shape) < 0.5).float() * 2 - 1
