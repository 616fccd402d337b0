"""When a method's curve reaches another's final robust accuracy, in seconds and in images, and how sure that is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .front import Estimate, Resampling, estimate


@dataclass(frozen=True)
class Trajectory:
    """A method on the way, of these seeds.

    costs [S,T]: seconds or images until each state; flags [S,T,N]: right under attack.
    """

    costs: np.ndarray
    flags: np.ndarray
    seeds: tuple[int, ...] = ()


def reached(costs: np.ndarray, accuracies: np.ndarray, target: float) -> float:
    """The cost at which a curve first reaches the target, on straight lines between its states; inf if it never does.

    costs, accuracies [T]. What came before the first state is not known: reached there counts as that state's cost.
    """
    above = np.flatnonzero(accuracies >= target)
    if not len(above):
        return float("inf")
    i = int(above[0])
    if i == 0:
        return float(costs[i])
    share = (target - accuracies[i - 1]) / (accuracies[i] - accuracies[i - 1])
    return float(costs[i - 1] + share * (costs[i] - costs[i - 1]))


def speed_up(method: Trajectory, baseline: Trajectory, resampling: Resampling) -> Estimate:
    """k: the baseline's whole cost, divided by the cost at which the method reaches the baseline's final accuracy.

    0 where it never does. The interval is over the same resampled seeds and samples for both.
    """
    value = _ratio(*_means(method), *_means(baseline))
    shares = resampling.seeds / resampling.seeds.sum(1, keepdims=True)
    drawn = [shares @ method.costs, resampling.means(method.flags), shares @ baseline.costs]
    drawn.append(resampling.means(baseline.flags))
    return estimate(value, np.array([_ratio(*one) for one in zip(*drawn)]))


def own_speed_up(baseline: Trajectory) -> float:
    """The same for the baseline itself: how early its curve was first as high as at its end. 1 or more."""
    return _ratio(*_means(baseline), *_means(baseline))


def _means(one: Trajectory) -> tuple[np.ndarray, np.ndarray]:
    """Costs and accuracies [T], over all seeds."""
    return one.costs.mean(0), one.flags.mean((0, 2))


def _ratio(costs: np.ndarray, accuracies: np.ndarray, their_costs: np.ndarray, theirs: np.ndarray) -> float:
    at = reached(costs, accuracies, theirs[-1])
    return float(their_costs[-1] / at) if np.isfinite(at) else 0.0
