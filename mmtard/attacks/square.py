"""Square (Andriushchenko et al., ECCV 2020), L-inf: random search by squares, asking the model for its scores alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import losses
from ..errors import UserError
from ..seeding import derive_seeds, sample_uniform
from .fused import fusible
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


_DRAWS = 64  # squares whose random numbers are drawn at once


@dataclass(frozen=True)
class _Walk:
    seeds: Tensor  # int64 [R]: of this restart
    best: Tensor  # [R,3,H,W]: the iterate of the lowest margin
    lowest: Tensor  # [R]
    corners: Tensor  # [R,_DRAWS,2] in [0,1): where the next squares lie
    signs: Tensor  # [R,_DRAWS,3], -1 or 1: their colours


def _search(state: AttackState, rows: Tensor, restart: int) -> None:
    eps, (_, c, h, w) = state.settings.eps, state.images.shape
    pursuit = Pursuit(state, rows, lambda logits, labels, _: -losses.margin(logits, labels))

    def begin() -> _Walk:
        seeds = derive_seeds(state.seeds[rows], restart)
        best = (pursuit.images + eps * _signs(seeds, (c, 1, w))).clamp(0, 1)  # vertical stripes
        return _Walk(seeds, best, -pursuit(best), *_draw(seeds, 0, c))

    def advance(walk: _Walk, i: int) -> _Walk:
        k = i % _DRAWS
        corners, signs = (walk.corners, walk.signs) if k or not i else _draw(walk.seeds, i, c)
        proposal = _proposal(
            walk.best, pursuit.images, corners[:, k].contiguous(), signs[:, k].contiguous(), side(i, h, w), eps
        )
        margin = -pursuit(proposal)
        better = (margin < walk.lowest).nonzero().flatten()
        best, lowest = walk.best, walk.lowest
        if len(better):
            best = best.index_copy_(0, better, proposal[better])  # in place: nobody asks for the iterate before
            lowest = torch.minimum(margin, lowest)
        return _Walk(walk.seeds, best, lowest, corners, signs)

    pursuit.run(_Walk, begin, advance, state.settings.queries - 1)


def _draw(seeds: Tensor, i: int, channels: int) -> tuple[Tensor, Tensor]:
    """Corners [R,_DRAWS,2] and signs [R,_DRAWS,channels] of the i-th square and those after it."""
    draws = torch.stack([derive_seeds(seeds, k + 1) for k in range(i, i + _DRAWS)], 1).flatten()
    corners, signs = sample_uniform(draws, (2,)), _signs(draws, (channels,))
    return corners.view(len(seeds), _DRAWS, 2), signs.view(len(seeds), _DRAWS, channels)


def side(i: int, h: int, w: int) -> int:
    """Side in pixels of the i-th square (from 0) on images of h x w."""
    p = _P_INIT / 2 ** sum(i > n for n in _HALVINGS)
    return min(max(round((p * h * w) ** 0.5), 1), h, w)


@fusible
def _proposal(best: Tensor, images: Tensor, corners: Tensor, signs: Tensor, side: int, eps: float) -> Tensor:
    """`best` with a square of each image's own place and colours."""
    colours = (images + eps * signs[:, :, None, None]).clamp(0, 1)
    h, w = images.shape[2:]
    return torch.where(_window(corners, h, w, side), colours, best)


def _window(corners: Tensor, h: int, w: int, side: int) -> Tensor:
    """Where each sample's square lies, uniform over all that fit: [R,2] in [0,1) -> bool [R,1,H,W]."""
    top, left = ((corners[:, k] * (n - side + 1)).long().view(-1, 1, 1, 1) for k, n in ((0, h), (1, w)))
    y = torch.arange(h, device=corners.device).view(1, 1, h, 1)
    x = torch.arange(w, device=corners.device).view(1, 1, 1, w)
    return ((y >= top) & (y < top + side)) & ((x >= left) & (x < left + side))


def _signs(seeds: Tensor, shape: tuple[int, ...]) -> Tensor:
    return (sample_uniform(derive_seeds(seeds, 0), shape) < 0.5).float() * 2 - 1
