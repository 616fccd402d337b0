"""What an attack knows and has found: it asks the model through an `AttackState`, which keeps the score."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import losses
from ..errors import UserError
from .inputs import check_count, check_eps, check_logits, check_positive
from .memory import AttackMemory, of_prefix, with_prefix
from .threat_model import check_norm

# images [B,3,H,W] float32 in [0,1] -> logits [B,C] float32; normalisation is inside
Classifier = Callable[[Tensor], Tensor]
SampleLoss = Callable[[Tensor, Tensor], Tensor]  # logits [R,C], labels int64 [R] -> [R]


@dataclass(frozen=True)
class AttackSettings:
    """One threat and the means spent on it: with the model, the images and their seeds, all that decides an outcome.

    eps: radius in units of [0,1] pixels. norm: linf or l2, in any spelling that `check_norm` takes. iters, restarts:
    of every gradient attack, at every target. queries: what Square may ask about one sample in one restart. targets:
    the most classes that a targeted attack aims at (min(targets, C - 1)). step_size: of PGD alone; None is 2.5 eps /
    iters.
    """

    eps: float
    norm: str = "linf"
    iters: int = 100
    restarts: int = 1
    queries: int = 5000
    targets: int = 9
    step_size: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "norm", check_norm(self.norm))
        object.__setattr__(self, "eps", check_eps(self.eps, self.norm))
        if not self.eps > 0:
            raise UserError(f"eps: {self.eps} is no attack; write a positive size such as 2/255")
        for name in ("iters", "restarts", "queries", "targets"):
            check_count(getattr(self, name), name)
        if self.step_size is not None:
            object.__setattr__(self, "step_size", check_positive(self.step_size, "step_size"))


def logits_of(model: Classifier, images: Tensor) -> Tensor:
    """The model's logits [B,C], outside any autocast: an attack of 1/255 does not survive bfloat16's rounding.

    Raises UserError where the model gives back anything but one row of float32 (or float64) for each image.
    """
    with torch.autocast(images.device.type, enabled=False):
        logits = model(images)
    check_logits(logits, images)
    return logits


class AttackState:
    """The samples that an attack is set on and, of each, the best iterate seen so far.

    Best: a misclassified iterate before a correctly classified one, then the larger loss. Judged on the very forward
    pass that the attack made, so that no later pass can take a success back.
    """

    def __init__(
        self,
        model: Classifier,
        images: Tensor,
        labels: Tensor,
        seeds: Tensor,
        settings: AttackSettings,
        source: Classifier | None = None,
        room: int = 0,
    ):
        self.model, self.source = model, source
        self.room = room  # samples that may stand in one batch, where several starts fit beside one another
        self.images, self.labels, self.seeds = images, labels, seeds
        self.settings = settings
        self.adv = images.clone()
        self.prediction = labels.clone()
        self.broken = torch.zeros_like(labels, dtype=torch.bool)
        self.not_finite = torch.zeros_like(self.broken)  # samples of which the model once gave NaN or infinity
        self.queries = 0  # forward passes, summed over samples
        self._loss = torch.full(labels.shape, -torch.inf, device=labels.device)
        self._order: Tensor | None = None
        self.start = 0  # of the attack's starts, the one that is under way; 0 again before another attack
        self.under_way: dict[str, Tensor] = {}  # what that start needs to go on where it is
        self.memory = AttackMemory()

    def standing(self) -> Tensor:
        """Indices of the samples that still stand: int64 [R]."""
        return (~self.broken).nonzero().flatten()

    def pursued(self, rows: Tensor) -> Tensor:
        """Which of the samples `rows` a start that is under way goes on with: bool [R]."""
        return ~self.broken[rows]

    def restarts(self) -> Iterator[tuple[int, Tensor]]:
        """(restart, indices of the samples that stand by then), as many as the settings say, until none stands."""
        for restart in range(self.start, self.settings.restarts):
            rows = self.standing()
            if not len(rows):
                return
            yield restart, rows
            self.start, self.under_way = restart + 1, {}

    def logits(self, images: Tensor) -> Tensor:
        """The model's logits [R,C] of any images, counted, not judged."""
        try:
            logits = logits_of(self.model, images)
        except ValueError:
            if len(images) > 1:
                raise
            # Batch norm in training mode refuses the last sample that stands; `checks.sanity` tells of such a model.
            logits = logits_of(self.model, images.expand(2, *images.shape[1:]))[:1]
        self.queries += len(images)
        return logits

    def target_order(self) -> Tensor:
        """The classes to aim at: int64 [B, min(targets, C-1)].

        Those of the highest logits of the clean image come first, the label never.
        """
        if self._order is None:
            with torch.no_grad():
                logits = self.logits(self.images).scatter(1, self.labels[:, None], torch.inf)
            self._order = logits.sort(dim=1, descending=True, stable=True).indices[:, 1 : 1 + self.settings.targets]
        return self._order

    def observe(
        self,
        images: Tensor,
        rows: Tensor,
        loss_fn: SampleLoss = losses.cross_entropy,
        allowed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits [R,C] and losses [R] of iterates of the samples `rows`, differentiable. Keeps each one's best iterate.

        allowed: bool [R], the iterates that lie inside the eps ball and may count; None is all of them.
        """
        logits = self.logits(images)
        loss = loss_fn(logits, self.labels[rows])
        with torch.no_grad():
            self._keep(images.detach(), rows, logits.detach(), loss.detach(), allowed)
        return logits, loss

    def _keep(self, images: Tensor, rows: Tensor, logits: Tensor, loss: Tensor, allowed: Tensor | None) -> None:
        prediction = losses.predicted_class(logits)
        finite = prediction != losses.NO_CLASS  # NaN is an error of the model, not a success of the attack
        wrong, broken = prediction != self.labels[rows], self.broken[rows]
        better = finite & ((wrong & ~broken) | ((wrong == broken) & (loss > self._loss[rows])))
        if allowed is not None:
            better &= allowed
        if not bool(finite.all()):
            self.not_finite[rows] |= ~finite
        kept = better.nonzero().flatten()
        if len(kept):
            at = rows[kept]
            self.adv[at], self.prediction[at] = images[kept], prediction[kept]
            self.broken[at], self._loss[at] = wrong[kept], loss[kept].to(self._loss.dtype)

    def take_over(self, other: AttackState, part: slice, rows: Tensor) -> None:
        """Show what another state has found of samples that stand: its places `part` are the samples `rows` here."""
        adv, broken, loss = other.adv[part], other.broken[part], other._loss[part]
        stands = ~self.broken[rows]
        better = stands & (broken | (loss > self._loss[rows]))
        self.not_finite[rows] |= stands & other.not_finite[part]
        at = rows[better]
        self.adv[at], self.prediction[at] = adv[better], other.prediction[part][better]
        self.broken[at], self._loss[at] = broken[better], loss[better]

    def snapshot(self) -> dict[str, Tensor]:
        """All that another process needs to go on, but for the images and the model."""
        tensors = {name: getattr(self, name) for name in _KEPT}
        if self._order is not None:
            tensors["_order"] = self._order
        numbers = {name: torch.tensor(getattr(self, name)) for name in ("queries", "start")}
        return tensors | numbers | with_prefix("under_way.", self.under_way)

    def restore(self, kept: dict[str, Tensor]) -> None:
        """Go on where the state of the same samples was when `kept` was taken."""
        for name in (*_KEPT, "_order"):
            if name in kept:
                setattr(self, name, kept[name].to(self.images.device))
        self.queries, self.start = int(kept["queries"]), int(kept["start"])
        self.under_way = of_prefix("under_way.", kept)


_KEPT = ("seeds", "adv", "prediction", "broken", "not_finite", "_loss")
