"""Times of several variants of one thing, taken alternately in one process, so that a slow minute hits all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..distributed.progress import WorkProgress


@dataclass(frozen=True)
class Spread:
    """What repeated measurements of one quantity say: its median, and the smallest and the largest of them."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """The spread of at least one value."""
        return cls(statistics.median(values), min(values), max(values), len(values))

    def __str__(self) -> str:
        if self.n == 1:
            return f"{self.median:.4g}"
        return f"{self.median:.4g} ({self.low:.4g}-{self.high:.4g})"

    @property
    def in_two_lines(self) -> str:
        """The same for a narrow column: the median, and below it what is in the brackets."""
        return f"{self.median:.3g}" + (f"\n{self.low:.3g}-{self.high:.3g}" if self.n > 1 else "")


def alternately(
    variants: Mapping[str, Callable[[], None]],
    rounds: int,
    device: torch.device,
    warm_up: int = 1,
    progress: WorkProgress | None = None,
    weights: Mapping[str, float] | None = None,
) -> dict[str, list[float]]:
    """Seconds that each variant took in each of `rounds` rounds, by name.

    A round runs every variant once, in the mapping's order and in every other round backwards. `warm_up` runs of each
    come first and do not count: a first run allocates, and may compile. The device is waited for before and after a
    run, so the time is that of the work and not of its launch. `progress` says which variant and round runs; by
    `weights`, the work of a variant beside the others', it tells the time left.
    """
    progress = progress or WorkProgress(shown=False)
    weights = weights or dict.fromkeys(variants, 1.0)
    progress.part("", (warm_up + rounds) * sum(weights.values()))
    for number in range(warm_up):
        for name, run in variants.items():
            with progress.running(f"{name}: warm-up {number + 1} of {warm_up}", weights[name]):
                run()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds):
        for name in list(variants)[:: -1 if number % 2 else 1]:
            with progress.running(f"{name}: round {number + 1} of {rounds}", weights[name]):
                seconds[name].append(timed(variants[name], device))
    return seconds


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that `run` takes, its work on the device included."""
    wait_for_device(device)
    began = time.perf_counter()
    run()
    wait_for_device(device)
    return time.perf_counter() - began


def wait_for_device(device: torch.device) -> None:
    """Wait until all that was launched on the device is done; nothing on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratios(numerator: list[float], denominator: list[float]) -> list[float]:
    """The ratio of two variants' times, round by round."""
    return [a / b for a, b in zip(numerator, denominator, strict=True)]
