"""The original AutoAttack (Croce & Hein, ICML 2020), run by the library pyautoattack: a cross-check of our attacks."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import UserError
from .state import AttackSettings, AttackState

if TYPE_CHECKING:
    from pyautoattack import AutoAttack

NORMS = {"linf": "Linf", "l2": "L2"}  # as the library spells them


def require_library() -> None:
    """UserError where pyautoattack is not installed."""
    if importlib.util.find_spec("pyautoattack") is None:
        raise UserError(
            "attacks: 'autoattack' runs pyautoattack, which is not installed; pip install pyautoattack, "
            "or take mmtard's own apgd-ce apgd-t fab-t square"
        )


def autoattack(state: AttackState) -> None:
    """AutoAttack's `standard` (APGD-CE, APGD-T, FAB-T, Square) on the samples that stand.

    iters, restarts, queries and targets are the settings' own; 100, 1, 5000 and 9 are `standard`. The library draws
    its random starts for a whole batch: unlike every other attack here, a sample's outcome depends on the batch it
    stands in.
    """
    from pyautoattack import AutoAttack

    s, rows = state.settings, state.standing()
    if not len(rows):
        return
    h, w = state.images.shape[-2:]
    if s.norm == "l2" and (min(h, w) < 5 or max(h, w) // (h // 5) > 5):
        # Its Square tiles the image in 5 x 5 parts, and writes beyond the edge where more fit.
        raise UserError(
            f"attacks: 'autoattack' does not run in L2 on images of {h}x{w} (pyautoattack's Square); "
            "take mmtard's own apgd-ce apgd-t fab-t, or another size"
        )
    labels = state.labels[rows]
    model = _Logits(state).eval()
    device = state.images.device
    # Its random generators take 32 bits.
    seed = int(state.seeds[rows[0]]) & 0x7FFFFFFF
    library = AutoAttack(model, norm=NORMS[s.norm], eps=s.eps, seed=seed, version="standard", device=device)
    library.verbose = False
    set_means(library, s, n_classes=state.logits(state.images[rows[:1]]).shape[1])
    with undisturbed(device):
        adv, _ = library.run_standard_evaluation(state.images[rows], labels, batch_size=len(rows))
    with torch.no_grad():
        state.observe(adv, rows)


def set_means(library: AutoAttack, settings: AttackSettings, n_classes: int) -> None:
    """Give the library's attacks the iterations, restarts, queries and targets of the settings."""
    for part in (library.apgd, library.apgd_targeted, library.fab):
        part.n_iter, part.n_restarts = settings.iters, settings.restarts
    for part in (library.apgd_targeted, library.fab):
        part.n_target_classes = min(settings.targets, n_classes - 1)
    library.square.n_queries, library.square.n_restarts = settings.queries, settings.restarts


class _Logits(nn.Module):
    """The model as the library calls it; every forward pass is counted."""

    def __init__(self, state: AttackState):
        super().__init__()
        self.state = state

    def forward(self, images: Tensor) -> Tensor:
        return self.state.logits(images)


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Puts torch's generators and Python's trace function back: the library seeds the ones and removes the other."""
    trace = sys.gettrace()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        sys.settrace(trace)
