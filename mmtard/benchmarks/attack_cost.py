"""What an attack cannot do without: its forwards and gradients to the pixels, alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from ..attacks.pgd import input_gradient
from .models import ResidentParts
from .timing import Spread, ratios

PASSES = "the attack's forwards and input gradients alone"


class AttackPasses:
    """As many forwards and input gradients of the attack's tower as the attack of a step takes, and nothing else.

    Made before the engine is instrumented, so that they are no part of its phases.
    """

    def __init__(self, parts: ResidentParts):
        attack = parts.task.attack
        self.number = (attack.steps + (attack.algorithm == "apgd")) * attack.restarts  # APGD also asks about its start
        self._parts = parts
        self._forward: Callable[[], AbstractContextManager] = parts.engine.attack_forward

    def __call__(self) -> None:
        """Take them on the resident batch, micro-batch by micro-batch."""
        batch, size = self._parts.batch, self._parts.engine.micro_batch_size
        for micro in batch.split(size):
            images = micro.pixels(batch.images.device)
            with self._forward() as forward:
                for _ in range(self.number):
                    input_gradient(lambda x: forward(x).square().sum(1), images)


def share_of_passes(attack: list[float], passes: list[float], number: int) -> tuple[Spread, str]:
    """(the attack's time by that of its passes, round by round; the sentence that says so)."""
    found = Spread.of(ratios(attack, passes))
    return found, (
        f"The attack takes {found.median:.3f} ({found.low:.3f}-{found.high:.3f}) of the time of {number} forwards and "
        "input gradients of its tower alone."
    )
