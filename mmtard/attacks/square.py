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
        best = (pursuit.images + eps * _signs(seeds, (c, 1, w))).clamp(0, 1).contiguous()  # vertical stripes
        return _Walk(seeds, best, -pursuit(best), *_draw(seeds, 0, c))

    def advance(walk: _Walk, i: int) -> _Walk:
        k = i % _DRAWS
        corners, signs = (walk.corners, walk.signs) if k or not i else _draw(walk.seeds, i, c)
        # Of every pixel of the squares alone: most are small, and the images' others stay.
        at = _pixels(corners[:, k], h, w, side(i, h, w))[:, None].expand(-1, c, -1)
        colours = (pursuit.images.flatten(2).gather(2, at) + eps * signs[:, k, :, None]).clamp(0, 1)
        proposal = walk.best.clone()
        proposal.view(-1, c, h * w).scatter_(2, at, colours)
        margin = -pursuit(proposal)
        better = margin < walk.lowest
        best = walk.best.view(-1, c, h * w)  # written in place: nobody asks for the iterate before
        best.scatter_(2, at, torch.where(better[:, None, None], colours, best.gather(2, at)))
        lowest = torch.where(better, margin, walk.lowest)
        return _Walk(walk.seeds, walk.best, lowest, corners, signs)

    pursuit.run(_Walk, begin, advance, state.settings.queries - 1)


def _draw(seeds: Tensor, i: int, channels: int) -> tuple[Tensor, Tensor]:
    """Corners [R,_DRAWS,2] and signs [R,_DRAWS,channels] of the i-th square and those after it."""
    ks = torch.arange(i + 1, i + 1 + _DRAWS, device=seeds.device)
    draws = derive_seeds(seeds.repeat_interleave(_DRAWS), ks.repeat(len(seeds)))
    corners, signs = sample_uniform(draws, (2,)), _signs(draws, (channels,))
    return corners.view(len(seeds), _DRAWS, 2), signs.view(len(seeds), _DRAWS, channels)


def side(i: int, h: int, w: int) -> int:
    """Side in pixels of the i-th square (from 0) on images of h x w."""
    p = _P_INIT / 2 ** sum(i > n for n in _HALVINGS)
    return min(max(round((p * h * w) ** 0.5), 1), h, w)


def _pixels(corners: Tensor, h: int, w: int, side: int) -> Tensor:
    """Of h * w pixels those of each sample's square, uniform over all that fit: [R,2] in [0,1) -> int64 [R,side^2]."""
    top, left = ((corners[:, k, None] * (n - side + 1)).long() for k, n in ((0, h), (1, w)))
    along = torch.arange(side, device=corners.device)
    return ((top + along)[:, :, None] * w + (left + along)[:, None, :]).flatten(1)


def _signs(seeds: Tensor, shape: tuple[int, ...]) -> Tensor:
    return (sample_uniform(derive_seeds(seeds, 0), shape) < 0.5).float() * 2 - 1
