"""What a method's whole front gains over the baseline's."""

from __future__ import annotations

import numpy as np

from .collect import KINDS
from .findings import Findings, State
from .front import Estimate, area, clean_at, estimate


def front_estimates(found: Findings, name: str, method: str) -> tuple[float, Estimate | None, Estimate | None]:
    """(dominated area, its difference from the baseline's, clean accuracy at its robustness less the baseline's)."""
    ours = _points(found, name, method)
    dominated = area(ours[0], found.study.front.reference)
    if found.baseline is None or method == found.baseline:
        return dominated, None, None
    theirs = _points(found, name, found.baseline)
    reference = found.study.front.reference
    gains = np.array([area(a, reference) - area(b, reference) for a, b in zip(ours[1], theirs[1])])
    gain = estimate(dominated - area(theirs[0], reference), gains)
    main = next(i for i, s in enumerate(_states(found, found.baseline)) if s.main)

    def at_equal(a: np.ndarray, b: np.ndarray) -> float:
        return clean_at(a, b[main][1]) - clean_at(b, b[main][1])

    value = at_equal(ours[0], theirs[0])
    equal = None if np.isnan(value) else estimate(value, np.array([at_equal(a, b) for a, b in zip(ours[1], theirs[1])]))
    return dominated, gain, equal


def _states(found: Findings, method: str) -> list[State]:
    return [state for state in found.states if state.method == method]


def _points(found: Findings, name: str, method: str) -> tuple[np.ndarray, np.ndarray]:
    """(clean and robust accuracy [P,2] of a method's settings, the same of each resample [R,P,2])."""
    states = _states(found, method)
    means = np.array([[found.accuracy(name, state, kind) for kind in KINDS] for state in states])
    resampled = []
    for state in states:
        flags = np.stack([found.flags(name, state, kind) for kind in KINDS], axis=1)  # [S,2,N]
        resampled.append(found.resampling(flags.shape[0], flags.shape[2]).means(flags))
    return means, np.stack(resampled, axis=1)
