"""Which samples are measured, and how far a measured accuracy can be from the true one."""

import math

import numpy as np

Z = 1.959964  # the normal quantile of 95 % intervals


def wilson_interval(hits: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a proportion of `hits` in `n` (Wilson 1927), as two fractions; (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = hits / n, Z * Z
    centre, half = p + z2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    low, high = (centre - half) / (1 + z2 / n), (centre + half) / (1 + z2 / n)
    return min(p, max(0.0, low)), max(p, min(1.0, high))  # p itself, where rounding puts it outside


def stratified(labels: np.ndarray, n: int | None, seed: int) -> np.ndarray:
    """Sample ids, sorted: all labelled ones, or `n` of them spread over the classes as evenly as their sizes allow.

    labels: int64 [N], -1 where unknown (never chosen). Which samples of a class are taken depends on `seed` alone,
    within one version of numpy: numpy may change how it shuffles.
    """
    known = np.flatnonzero(labels >= 0)
    if n is None or n >= len(known):
        return known
    rng = np.random.Generator(np.random.Philox(seed))
    shuffled = rng.permutation(known)
    # The k-th sample of every class comes before the (k+1)-th of any: taking the first n is even over the classes.
    turn, seen = np.empty(len(shuffled), dtype=np.int64), {}
    for i, label in enumerate(labels[shuffled].tolist()):
        turn[i] = seen[label] = seen.get(label, -1) + 1
    return np.sort(shuffled[np.argsort(turn, kind="stable")[:n]])


def mcnemar(only_a: int, only_b: int) -> float:
    """The two-sided p-value of McNemar's exact test (1947).

    only_a, only_b: samples that one model alone gets right. Are parts as unequal as these likely when each is as
    probable? Binomial(only_a + only_b, 1/2); 1 when the models never differ.
    """
    n, fewer = only_a + only_b, min(only_a, only_b)
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, k) for k in range(fewer + 1))  # integers: exact for any n
    return min(1.0, 2 * tail / 2**n)


def paired_difference(a: list[bool], b: list[bool]) -> dict:
    """How b's accuracy differs from a's on the same samples.

    The difference, its 95 % interval (`newcombe_interval`) and McNemar's p.
    """
    n, only_a, only_b = len(a), sum(x and not y for x, y in zip(a, b)), sum(y and not x for x, y in zip(a, b))
    low, high = newcombe_interval(sum(x and y for x, y in zip(a, b)), only_a, only_b, n)
    return {
        "difference": (only_b - only_a) / n,
        "interval95": [low, high],
        "only_a": only_a,
        "only_b": only_b,
        "n": n,
        "p": mcnemar(only_a, only_b),
    }


def newcombe_interval(both: int, only_a: int, only_b: int, n: int) -> tuple[float, float]:
    """The 95 % interval of b's proportion minus a's on the same n samples.

    The hybrid score interval, method 10 of Newcombe, "Improved confidence intervals for the difference between binomial
    proportions based on paired data", Statistics in Medicine 17 (1998): the two Wilson intervals, joined by the
    correlation of the pairs. It has a width also where no sample differs, which Wald's has not.
    """
    neither = n - both - only_a - only_b
    a, b = (both + only_a) / n, (both + only_b) / n
    (low_a, high_a), (low_b, high_b) = wilson_interval(both + only_a, n), wilson_interval(both + only_b, n)
    product = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    covariance = both * neither - only_a * only_b
    if covariance > 0:
        covariance = max(covariance - n / 2, 0)  # a continuity correction
    phi = covariance / math.sqrt(product) if product else 0.0

    def joined(of_a: float, of_b: float) -> float:
        return math.sqrt(max(0.0, of_a**2 - 2 * phi * of_a * of_b + of_b**2))

    return b - a - joined(high_a - a, b - low_b), b - a + joined(a - low_a, high_b - b)
