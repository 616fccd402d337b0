"""One start of an attack: the samples that it still pursues, and where it is with each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import losses
from ..seeding import derive_seeds
from .memory import AttackMemory, of_prefix, tensors_of, with_prefix
from .state import AttackState

Walk = TypeVar("Walk", bound=Any)  # a dataclass of tensors [R,...]: where an attack is with each of its samples
RowLoss = Callable[[Tensor, Tensor, Tensor], Tensor]  # logits [R,C], labels [R], places in the state [R] -> [R]


def cross_entropy(logits: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
    """The cross-entropy of each sample, as a RowLoss: the places are not asked for."""
    return losses.cross_entropy(logits, labels)


class Pursuit:
    """One start of an attack on samples of a state: a sample that falls leaves it at once.

    rows: int64 [R], the places in the state of the samples that are pursued still. images: theirs, [R,C,H,W]. Called
    with an iterate of each, a pursuit shows them to the state and gives back the attack's losses, [R].
    """

    def __init__(self, state: AttackState, rows: Tensor, loss: RowLoss = cross_entropy):
        self.state, self.rows, self.images = state, rows, state.images[rows]
        self._loss = loss

    def __call__(self, images: Tensor) -> Tensor:
        return self.observe(images)[1]

    def observe(self, images: Tensor, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits [R,C] and losses [R] of an iterate of each sample; see `AttackState.observe`."""
        rows = self.rows
        return self.state.observe(images, rows, lambda logits, labels: self._loss(logits, labels, rows), allowed)

    def run(
        self, kind: type[Walk], begin: Callable[[], Walk], advance: Callable[[Walk, int], Walk], steps: int
    ) -> Walk:
        """The walk of the samples that stand after `steps` calls of `advance(walk, k)`, each on those that stand yet.

        begin: makes the walk of all samples, a `kind`, where no earlier process has left one. A sample's arithmetic is
        its own: it ends as if none had left.
        """
        first, walk = self._kept(kind) or (0, begin())
        for k in range(first, steps):
            walk = self._leave_fallen(walk)
            if not len(self.rows):
                return walk
            self._keep(k, walk)
            walk = advance(walk, k)
        walk = self._leave_fallen(walk)
        self._keep(steps, walk)
        return walk

    def _keep(self, k: int, walk: Any) -> None:
        place = {"rows": self.rows, "k": torch.tensor(k)}
        self.state.under_way = place | with_prefix("walk.", tensors_of(walk))
        self.state.memory.at_step()

    def _kept(self, kind: type[Walk]) -> tuple[int, Walk] | None:
        kept, self.state.under_way = self.state.under_way, {}
        if not kept:
            return None
        device = self.state.images.device
        self.rows = kept["rows"].to(device)
        self.images = self.state.images[self.rows]
        return int(kept["k"]), kind(**{name: t.to(device) for name, t in of_prefix("walk.", kept).items()})

    def _leave_fallen(self, walk: Walk) -> Walk:
        pursued = self.state.pursued(self.rows)
        if bool(pursued.all()):
            return walk
        at = pursued.nonzero().flatten()
        self.rows, self.images = self.rows[at], self.images[at]
        return replace(walk, **{field.name: getattr(walk, field.name)[at] for field in fields(walk)})


@dataclass(frozen=True)
class Aim:
    """What a start of a targeted attack is, for every place of a state: tensors [B]."""

    targets: Tensor  # int64: the class to aim at
    seeds: Tensor  # int64: of this start
    restarted: Tensor  # bool: whether it is another than the first start at this class


class Tries(AttackState):
    """Several starts of an attack on the same samples in one batch, which end as they do one after the other.

    A sample that falls to one start would not have been asked by later ones: those leave, and earlier ones go on.
    rows: int64 [R], the samples' places in `state`. The places here are start by start, n * R.
    """

    def __init__(self, state: AttackState, rows: Tensor, n: int):
        tiled = rows.repeat(n)
        super().__init__(state.model, state.images[tiled], state.labels[tiled], state.seeds[tiled], state.settings)
        self.of, self.of_rows, self.n = state, rows, n
        places = torch.arange(n * len(rows), device=rows.device)
        self._start, self._sample = places // len(rows), places % len(rows)
        self.memory = AttackMemory(at_step=self._at_step)

    def _at_step(self) -> None:
        self.of.under_way = {"of_rows": self.of_rows, "n": torch.tensor(self.n)} | with_prefix(
            "tries.", self.snapshot()
        )
        self.of.memory.at_step()

    def pursued(self, rows: Tensor) -> Tensor:
        """Whether each try is still pursued, bool [R]: no earlier start of its sample has fallen. rows: int64 [R]."""
        first = torch.full_like(self.of_rows, self.n)  # the start that each sample fell to
        first.scatter_reduce_(0, self._sample[self.broken], self._start[self.broken], "amin")
        return self._start[rows] < first[self._sample[rows]]

    def give_back(self) -> None:
        """Show the state what each start found, in their order."""
        size = len(self.of_rows)
        for start in range(self.n):
            self.of.take_over(self, slice(start * size, (start + 1) * size), self.of_rows)
        self.of.queries += self.queries


def at_targets(state: AttackState, attack: Callable[[AttackState, Tensor, Aim], None]) -> None:
    """Set a targeted attack on the samples that stand, towards each of the highest other classes in turn.

    attack(state, rows, aim): one start, on the samples `rows` of the state. As many starts run in one batch as
    `state.room` holds of the samples that stand; each sample ends as if they ran one after the other.
    """
    order, restarts = state.target_order(), state.settings.restarts
    starts = [(k, restart) for k in range(order.shape[1]) for restart in range(restarts)]
    while state.start < len(starts):
        tries = _kept_tries(state) or _new_tries(state, len(starts) - state.start)
        if tries is None:
            return
        now = starts[state.start : state.start + tries.n]
        aims = [_aim(state, order, tries.of_rows, k, restart) for k, restart in now]
        places = torch.arange(len(tries.labels), device=tries.labels.device)
        attack(tries, places, Aim(*(torch.cat([getattr(aim, field.name) for aim in aims]) for field in fields(Aim))))
        tries.give_back()
        state.start, state.under_way = state.start + tries.n, {}


def _new_tries(state: AttackState, left: int) -> Tries | None:
    rows = state.standing()
    return Tries(state, rows, min(max(1, state.room // len(rows)), left)) if len(rows) else None


def _kept_tries(state: AttackState) -> Tries | None:
    """The starts that an earlier process has left in the middle."""
    kept, state.under_way = state.under_way, {}
    if not kept:
        return None
    tries = Tries(state, kept["of_rows"].to(state.images.device), int(kept["n"]))
    tries.restore(of_prefix("tries.", kept))
    return tries


def _aim(state: AttackState, order: Tensor, rows: Tensor, k: int, restart: int) -> Aim:
    """Start number `restart` at each sample's k-th class."""
    return Aim(
        targets=order[rows, k],
        seeds=derive_seeds(state.seeds[rows], k * state.settings.restarts + restart),
        restarted=torch.full_like(rows, restart > 0, dtype=torch.bool),
    )
