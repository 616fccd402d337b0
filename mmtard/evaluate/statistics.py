"""Which samples are measured, and how far a measured accuracy can be from the true one."""

import math

import numpy as np


def wilson_interval(hits: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a proportion of `hits` in `n` (Wilson 1927), as two fractions; (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = hits / n, z * z
    centre, half = p + z2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z2 / n)), min(1.0, (centre + half) / (1 + z2 / n))


def stratified(labels: np.ndarray, n: int | None, seed: int) -> np.ndarray:
    """Sample ids, sorted: all labelled ones, or `n` of them spread over the classes as evenly as their sizes allow.

    labels: int64 [N], -1 where unknown (never chosen). Which samples of a class are taken depends on `seed` alone.
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
