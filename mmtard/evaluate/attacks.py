"""The attacks of an evaluation, found by name: each takes a `Trial` and breaks what it can of the samples that still stand.

The evaluation variant of Croce & Hein (ICML 2020): random starts from per-sample seeds, summed losses, explicit restarts, each
restart and target on the survivors of those before, and the misclassified iterate kept whichever step it came from.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import losses
from ..attacks import apgd, derive_seeds, pgd
from ..errors import UserError, unknown
from .fab import fab_t
from .square import square
from .trial import Trial, logits_of


def pgd_ce(trial: Trial) -> None:
    """PGD on cross-entropy; any of its iterates may break a sample (papers of TeCoA's line judge the last alone)."""
    s = trial.settings
    step_size = 2.5 * s.eps / s.iters if s.step_size is None else s.step_size
    for restart, rows in _restarts(trial):
        loss, seeds = _loss_fn(trial, rows, losses.cross_entropy), derive_seeds(trial.seeds[rows], restart)
        adv = pgd(loss, trial.images[rows], norm=s.norm, eps=s.eps, step_size=step_size, steps=s.iters, seeds=seeds)
        with torch.no_grad():
            loss(adv)


def apgd_ce(trial: Trial) -> None:
    """APGD on cross-entropy."""
    for restart, rows in _restarts(trial):
        _apgd(trial, rows, losses.cross_entropy, restart)


def apgd_dlr(trial: Trial) -> None:
    """APGD on the difference of logits ratio."""
    for restart, rows in _restarts(trial):
        _apgd(trial, rows, losses.dlr, restart)


def apgd_t(trial: Trial) -> None:
    """APGD on the targeted difference of logits ratio, towards each of the highest other classes of the clean image in turn."""
    order = trial.target_order()
    for k in range(order.shape[1]):
        for restart, rows in _restarts(trial):
            targets = order[rows, k]
            _apgd(trial, rows, lambda z, y, t=targets: losses.targeted_dlr(z, y, t), k * trial.settings.restarts + restart)


def transfer(trial: Trial) -> None:
    """APGD on the cross-entropy of another model; its images of largest loss there are shown to this one."""
    s = trial.settings
    if trial.source is None:
        raise UserError("attacks: 'transfer' needs a model to transfer from; name it with --transfer-from")
    for restart, rows in _restarts(trial):
        labels, seeds = trial.labels[rows], derive_seeds(trial.seeds[rows], restart)
        adv = apgd(lambda x, y=labels: losses.cross_entropy(logits_of(trial.source, x), y), trial.images[rows], norm=s.norm, eps=s.eps, steps=s.iters, seeds=seeds)
        with torch.no_grad():
            trial.ask(adv, rows)


ATTACKS: dict[str, Callable[[Trial], None]] = {
    "pgd": pgd_ce,
    "apgd-ce": apgd_ce,
    "apgd-dlr": apgd_dlr,
    "apgd-t": apgd_t,
    "fab-t": fab_t,
    "square": square,
    "transfer": transfer,
}
WHITE_BOX = ("pgd", "apgd-ce", "apgd-dlr", "apgd-t", "fab-t")  # these use the model's own gradient
_FEWEST_CLASSES = {"apgd-dlr": (3, "the DLR loss"), "apgd-t": (4, "the targeted DLR loss")}


def find(name: str) -> Callable[[Trial], None]:
    """The attack of that name. Raises UserError for an unknown one."""
    if name not in ATTACKS:
        raise unknown("attack", name, ATTACKS)
    return ATTACKS[name]


def not_defined(name: str, n_classes: int) -> str | None:
    """Why an attack does not exist for so few classes, or None where it does."""
    fewest, what = _FEWEST_CLASSES.get(name, (2, "an attack"))
    return None if n_classes >= fewest else f"{what} needs {fewest} classes, there are {n_classes}"


def _restarts(trial: Trial):
    """(restart, indices of the samples that stand by then), until none stands."""
    for restart in range(trial.settings.restarts):
        rows = trial.remaining()
        if not len(rows):
            return
        yield restart, rows


def _loss_fn(trial: Trial, rows: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: trial.ask(x, rows, loss)[1]


def _apgd(trial: Trial, rows: Tensor, loss: Callable[[Tensor, Tensor], Tensor], start: int) -> None:
    s, seeds = trial.settings, derive_seeds(trial.seeds[rows], start)
    apgd(_loss_fn(trial, rows, loss), trial.images[rows], norm=s.norm, eps=s.eps, steps=s.iters, seeds=seeds)
