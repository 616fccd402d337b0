"""Fronts of clean and robust accuracy, the area they dominate, and what a method has at another's robustness.

A recipe that only moves along the front of another one trades; it does not gain. The dominated area (the hypervolume
indicator in two dimensions: Zitzler & Thiele, IEEE Transactions on Evolutionary Computation 3, 1999) grows by a point
only where no other point of the method has both accuracies as high.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Points = np.ndarray  # [P,2]: clean and robust accuracy, in [0,1]


def front(points: Points) -> list[int]:
    """The places of the points that no other one equals or beats in both, by falling clean accuracy; twins once."""
    order = sorted(range(len(points)), key=lambda i: (-points[i][0], -points[i][1]))
    kept, best = [], -np.inf
    for i in order:
        if points[i][1] > best:
            kept.append(i)
            best = points[i][1]
    return kept


def staircase(points: Points) -> np.ndarray:
    """The border [Q,2] of what the front dominates, from its cleanest point to its most robust one."""
    kept = points[front(points)]
    corners = np.stack([kept[1:, 0], kept[:-1, 1]], axis=1)  # as clean as the next point, as robust as this one
    steps = np.empty((2 * len(kept) - 1, 2))
    steps[::2], steps[1::2] = kept, corners
    return steps


def area(points: Points, reference: tuple[float, float] = (0.0, 0.0)) -> float:
    """The area between the reference corner and the front; points below the corner add nothing."""
    total, below = 0.0, reference[1]
    for i in front(points):
        width, height = points[i][0] - reference[0], points[i][1] - below
        if width > 0 and height > 0:
            total += width * height
            below = points[i][1]
    return total


def clean_at(points: Points, robust: float) -> float:
    """The clean accuracy of the front at a robust accuracy, on the highest straight line between two of its points.

    Two models that take turns by lot have what lies between them, so a point more never lowers it. That of the
    cleanest point where even that one is more robust; NaN where none is robust enough.
    """
    above, below = points[points[:, 1] >= robust], points[points[:, 1] < robust]
    if not len(above):
        return float("nan")
    at = above[:, 0].max()  # a point that is more robust than was asked for is robust enough
    if len(below):
        share = (robust - below[:, None, 1]) / (above[None, :, 1] - below[:, None, 1])
        at = max(at, (below[:, None, 0] + share * (above[None, :, 0] - below[:, None, 0])).max())
    return float(at)


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval over resampled seeds and samples. unknown: share of resamples without one.

    p: two-sided, that it is not 0: twice the share of resamples on the other side of 0, at it, or without a number.
    """

    value: float
    low: float
    high: float
    unknown: float = 0.0
    p: float = 1.0


def estimate(value: float, resampled: np.ndarray) -> Estimate:
    """The percentile interval and p. Resamples without a number (NaN) are left out of the interval, their share is
    told, and p counts them against the difference: a front that is not as robust there has not gained.
    """
    known = resampled[~np.isnan(resampled)]
    if not len(known):
        return Estimate(value, float("nan"), float("nan"), 1.0)
    low, high = np.quantile(known, [0.025, 0.975], method="nearest")
    beyond = min(int((known <= 0).sum()), int((known >= 0).sum())) + len(resampled) - len(known)
    p = min(1.0, 2 * (beyond + 1) / (len(resampled) + 1))
    return Estimate(value, float(low), float(high), 1 - len(known) / len(resampled), p)


@dataclass(frozen=True)
class Resampling:
    """The pigeonhole bootstrap (Owen, Annals of Applied Statistics 1, 2007): seeds and samples, each with replacement.

    One draw serves all methods, so that differences stay paired. It is conservative for samples; S seeds make it narrow
    for seeds by sqrt((S-1)/S), which a few seeds cannot mend: differences of means have the test of `crossed`.
    """

    seeds: np.ndarray  # [R,S] counts
    samples: np.ndarray  # [R,N] counts, as shares of N

    @classmethod
    def draw(cls, resamples: int, seeds: int, samples: int, seed: int = 0) -> Resampling:
        """Draw `resamples` times how often each of the seeds and samples counts; the same draws for the same `seed`."""
        # Generators of their own, so that the same samples are drawn whatever the number of seeds.
        of_seeds, of_samples = (np.random.Generator(np.random.Philox([seed, part])) for part in (0, 1))
        return cls(
            of_seeds.multinomial(seeds, np.full(seeds, 1 / seeds), resamples),
            of_samples.multinomial(samples, np.full(samples, 1 / samples), resamples).astype(np.float32) / samples,
        )

    def means(self, flags: np.ndarray) -> np.ndarray:
        """Accuracies [R,T] of resamples, of flags [S,T,N]: right or not, of each seed, at each of T states."""
        seeds, states, samples = flags.shape
        by_seed = flags.reshape(seeds * states, samples).astype(np.float32) @ self.samples.T  # [S*T,R]
        shares = self.seeds / self.seeds.sum(1, keepdims=True)
        return np.einsum("rs,str->rt", shares, by_seed.reshape(seeds, states, -1).astype(np.float64))
