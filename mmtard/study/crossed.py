"""Whether two methods differ, judged over samples AND seeds: the mixed model of paired differences.

Two methods are measured on the same N samples with the same S seeds. The difference of seed s on sample i is
d[s,i] = mu + u[s] + v[i] + e[s,i]: a seed that suits one method, a sample that suits one method, and the rest, each
drawn at random. The variance of the mean difference is var(u)/S + var(v)/N + var(e)/(S N). A test over samples alone
(McNemar's) leaves var(u) out: it says that these trained models differ, not that the methods do. A test over seeds
alone leaves var(v) out.

The three variances come from the analysis of variance (method of moments; a negative one counts as 0), the degrees of
freedom from Satterthwaite's approximation (Biometrics Bulletin 2, 1946), as for Clark's quasi F (Journal of Verbal
Learning and Verbal Behavior 12, 1973). The mean square of seeds keeps its few degrees of freedom also where it is no
larger than that of the rest: a few seeds that happen to agree do not show that seeds agree, and a p that took them for
it would be far too small. So with three seeds a small p needs a difference that is many times its error.

It assumes that seeds and samples are draws from what the claim is about, that u, v and e do not depend on one another,
and that the mean of so many right-or-wrong differences is near a normal one. With one seed there is no var(u): the test
is over samples, and the result says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

TINY = 1e-300


@dataclass(frozen=True)
class Difference:
    """mean: of b minus a, in [-1,1], with its 95 % interval, the two-sided p, and what it was judged over."""

    mean: float
    low: float
    high: float
    p: float
    seeds: int
    samples: int
    freedom: float


def difference_over_seeds(a: np.ndarray, b: np.ndarray) -> Difference:
    """How b differs from a: [S,N] bool or numbers, the same seeds and the same samples in both.

    Raises ValueError for arrays of other shapes, or without a sample.
    """
    if a.shape != b.shape or a.ndim != 2 or not a.size:
        raise ValueError(f"difference_over_seeds: shapes {a.shape} and {b.shape}; give two alike, [seeds, samples]")
    d = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    seeds, samples = d.shape
    mean = float(d.mean())
    variance, freedom = _variance_of_mean(d)
    if variance <= 0:  # no sample differs from another in any seed: as if one sample's outcome had been another
        variance, freedom = 1 / samples**2, float(max(samples - 1, 1))
    error = math.sqrt(variance)
    half = error * t_quantile(0.975, freedom)
    p = two_sided_p(mean / error, freedom)
    return Difference(mean, mean - half, mean + half, p, seeds, samples, freedom)


def _variance_of_mean(d: np.ndarray) -> tuple[float, float]:
    """(variance of the mean of d [S,N], its degrees of freedom)."""
    seeds, samples = d.shape
    by_sample = d.mean(0)
    if seeds == 1:
        return float(by_sample.var(ddof=1)) / samples if samples > 1 else 0.0, max(samples - 1, 1)
    if samples == 1:
        return float(d.mean(1).var(ddof=1)) / seeds, seeds - 1
    # Mean squares: of seeds, of samples, of what is left.
    of_seeds = samples * float(d.mean(1).var(ddof=1))
    of_samples = seeds * float(by_sample.var(ddof=1))
    rest = d - d.mean(1, keepdims=True) - by_sample + d.mean()
    left = float((rest**2).sum()) / ((seeds - 1) * (samples - 1))
    # Their sum, less what is counted twice, is S N var(mean).
    terms = [(max(of_seeds, left), seeds - 1)]
    if of_samples > left:
        terms += [(of_samples, samples - 1), (-left, (seeds - 1) * (samples - 1))]
    total = sum(square for square, _ in terms)
    freedom = total**2 / max(sum(square**2 / f for square, f in terms), TINY) if total > 0 else seeds - 1
    return total / (seeds * samples), max(freedom, 1.0)


def holm(p: list[float]) -> list[float]:
    """p-values for several comparisons at once (Holm, Scandinavian Journal of Statistics 6, 1979), in their order."""
    adjusted, largest = [1.0] * len(p), 0.0
    for place, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - place) * p[i]))
        adjusted[i] = largest
    return adjusted


def two_sided_p(t: float, freedom: float) -> float:
    """The probability of a Student's t at least as far from 0."""
    return _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t))


def t_quantile(share: float, freedom: float) -> float:
    """The t that a share > 1/2 of Student's distribution lies below, by bisection."""
    low, high = 0.0, 1.0
    while 1 - two_sided_p(high, freedom) / 2 < share:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if 1 - two_sided_p(middle, freedom) / 2 < share else (low, middle)
    return (low + high) / 2


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function, by its continued fraction (DLMF 8.17.22) and Lentz's method."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    c, d = 1.0, 1 / _not_zero(1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, 1000):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d, c = 1 / _not_zero(1 + numerator * d), _not_zero(1 + numerator / c)
            fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * fraction / a


def _not_zero(x: float) -> float:
    return x if abs(x) > TINY else TINY
