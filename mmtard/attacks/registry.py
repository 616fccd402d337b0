"""The attacks of an evaluation, by name: each takes an `AttackState` and breaks what it can of the samples that stand.

The evaluation variant of Croce & Hein (ICML 2020): random starts from per-sample seeds, summed losses, explicit
restarts, each restart and target on the survivors of those before. A sample that falls is asked no more, whichever
step it fell at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import losses
from ..errors import UserError, unknown_name
from ..seeding import derive_seeds
from . import autoattack
from .apgd import Apgd, ApgdWalk, apgd
from .fab import fab_t
from .pgd import pgd_step
from .pursuit import Aim, Pursuit, at_targets
from .square import square
from .state import AttackState, SampleLoss, logits_of
from .threat_model import random_start


@dataclass(frozen=True)
class _Iterate:
    adv: Tensor  # [R,3,H,W]


def pgd_ce(state: AttackState) -> None:
    """PGD on cross-entropy; any of its iterates may break a sample (papers of TeCoA's line judge the last alone)."""
    s = state.settings
    step_size = 2.5 * s.eps / s.iters if s.step_size is None else s.step_size
    for restart, rows in state.restarts():
        pursuit, seeds = Pursuit(state, rows), derive_seeds(state.seeds[rows], restart)

        def begin(pursuit: Pursuit = pursuit, seeds: Tensor = seeds) -> _Iterate:
            return _Iterate(random_start(pursuit.images, seeds, s.norm, s.eps))

        def advance(walk: _Iterate, _: int, pursuit: Pursuit = pursuit) -> _Iterate:
            return _Iterate(pgd_step(pursuit, walk.adv, pursuit.images, norm=s.norm, eps=s.eps, step_size=step_size))

        last = pursuit.run(_Iterate, begin, advance, s.iters)
        if len(pursuit.rows):
            with torch.no_grad():
                pursuit(last.adv)  # The last iterate was not yet observed.


def apgd_ce(state: AttackState) -> None:
    """APGD on cross-entropy."""
    for restart, rows in state.restarts():
        _apgd(state, rows, losses.cross_entropy, derive_seeds(state.seeds[rows], restart))


def apgd_dlr(state: AttackState) -> None:
    """APGD on the difference of logits ratio."""
    for restart, rows in state.restarts():
        _apgd(state, rows, losses.dlr, derive_seeds(state.seeds[rows], restart))


def apgd_t(state: AttackState) -> None:
    """APGD on the targeted difference of logits ratio, towards each of the highest other classes in turn."""
    at_targets(state, _apgd_at)


def _apgd_at(state: AttackState, rows: Tensor, aim: Aim) -> None:
    def loss(logits: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        return losses.targeted_dlr(logits, labels, aim.targets[rows])

    _climb(Pursuit(state, rows, loss), aim.seeds[rows])


def transfer(state: AttackState) -> None:
    """APGD on the cross-entropy of another model; its images of largest loss there are shown to this one."""
    s, source = state.settings, state.source
    if source is None:
        raise UserError("attacks: 'transfer' needs a model to transfer from; name it with --transfer-from")
    for restart, rows in state.restarts():
        labels, seeds = state.labels[rows], derive_seeds(state.seeds[rows], restart)

        def loss(images: Tensor, labels: Tensor = labels) -> Tensor:
            return losses.cross_entropy(logits_of(source, images), labels)

        adv = apgd(loss, state.images[rows], norm=s.norm, eps=s.eps, steps=s.iters, seeds=seeds)
        with torch.no_grad():
            state.observe(adv, rows)


ATTACKS: dict[str, Callable[[AttackState], None]] = {
    "pgd": pgd_ce,
    "apgd-ce": apgd_ce,
    "apgd-dlr": apgd_dlr,
    "apgd-t": apgd_t,
    "fab-t": fab_t,
    "square": square,
    "transfer": transfer,
    "autoattack": autoattack.autoattack,
}
ALIASES = {"aa": "autoattack"}
# These follow the model's own gradient: what another finds after them is a warning. (`autoattack` is a cross-check.)
WHITE_BOX = ("pgd", "apgd-ce", "apgd-dlr", "apgd-t", "fab-t")
_FEWEST_CLASSES = {
    "apgd-dlr": (3, "the DLR loss"),
    "apgd-t": (4, "the targeted DLR loss"),
    "autoattack": (4, "the targeted DLR loss"),
}


def attack_name(name: str) -> str:
    """The attack's name in `ATTACKS`. Raises UserError for an unknown one, and for a library that is not installed."""
    full = ALIASES.get(name, name)
    if full not in ATTACKS:
        raise unknown_name("attack", name, ATTACKS)
    if full == "autoattack":
        autoattack.require_library()
    return full


def find_attack(name: str) -> Callable[[AttackState], None]:
    """The attack of that name. Raises UserError as `attack_name` does."""
    return ATTACKS[attack_name(name)]


def not_defined(name: str, n_classes: int) -> str | None:
    """Why an attack does not exist for so few classes, or None where it does."""
    fewest, what = _FEWEST_CLASSES.get(name, (2, "an attack"))
    return None if n_classes >= fewest else f"{what} needs {fewest} classes, there are {n_classes}"


def _apgd(state: AttackState, rows: Tensor, loss: SampleLoss, seeds: Tensor) -> None:
    _climb(Pursuit(state, rows, lambda logits, labels, _: loss(logits, labels)), seeds)


def _climb(pursuit: Pursuit, seeds: Tensor) -> None:
    s = pursuit.state.settings
    climb = Apgd(s.norm, s.eps, s.iters)
    pursuit.run(
        ApgdWalk,
        lambda: climb.begin(pursuit, pursuit.images, seeds),
        lambda walk, k: climb.advance(walk, k, pursuit, pursuit.images),
        s.iters,
    )
