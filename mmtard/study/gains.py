"""What a method's whole front gains over the baseline's, and over the joint front of all baselines."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .collect import KINDS
from .findings import Findings
from .front import Estimate, area, clean_at, estimate


@dataclass(frozen=True)
class Gains:
    """Of a method on an evaluation; None where there is nothing to compare.

    area: that its front dominates, in [0,1]. area_gain: that less the baseline's. at_equal: its front's clean accuracy
    less the baseline's, where the baseline at its tuned settings is as robust. at_equal_all: the same against the front
    of all baselines together. Fronts are compared where they are drawn over the same points of the grid: one that lacks
    some, as half-way through a study, dominates less for that alone.
    """

    area: float
    area_gain: Estimate | None = None
    at_equal: Estimate | None = None
    at_equal_all: Estimate | None = None


def front_gains(found: Findings, name: str, method: str) -> Gains:
    """What the front of a method gains on an evaluation, with intervals over resampled seeds and samples."""
    key = name, method
    if key not in found.gains:  # the page, its sentences and its files ask for the same
        found.gains[key] = _front_gains(found, name, method)
    return found.gains[key]


def _front_gains(found: Findings, name: str, method: str) -> Gains:
    ours, reference = _points(found, name, [method]), found.study.front.reference
    dominated = area(ours[0], reference)
    if found.baseline is None or method == found.baseline:
        return Gains(dominated)
    main = next((i for i, s in enumerate(found.front_states(found.baseline)) if s.main), None)
    if main is None:  # other settings have more seeds so far
        return Gains(dominated)
    whole = found.front_points(found.baseline)
    if found.front_points(method) != whole:
        return Gains(dominated)
    theirs = _points(found, name, [found.baseline])
    gains = np.array([area(a, reference) - area(b, reference) for a, b in zip(ours[1], theirs[1])])
    gain = estimate(dominated - area(theirs[0], reference), gains)
    robust = theirs[0][main][1], theirs[1][:, main, 1]
    # A baseline is no part of what it is held against.
    others = [m for m, one in found.study.methods.items() if one.baseline and one.ablates is None and m != method]
    joint = None
    if all(found.front_points(other) == whole for other in others):
        joint = _at_equal(ours, _points(found, name, others), robust)
    return Gains(dominated, gain, _at_equal(ours, theirs, robust), joint)


def _at_equal(ours: tuple, theirs: tuple, robust: tuple[float, np.ndarray]) -> Estimate | None:
    """The difference of two fronts' clean accuracies at a robust accuracy: its own in each resample."""
    value = clean_at(ours[0], robust[0]) - clean_at(theirs[0], robust[0])
    if np.isnan(value):
        return None
    return estimate(
        value, np.array([clean_at(a, r) - clean_at(b, r) for a, b, r in zip(ours[1], theirs[1], robust[1])])
    )


def _points(found: Findings, name: str, methods: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(clean and robust accuracy [P,2] of the methods' settings, the same of each resample [R,P,2])."""
    states = [state for method in methods for state in found.front_states(method)]
    means = np.array([[found.accuracy(name, state, kind) for kind in KINDS] for state in states])
    resampled = []
    for state in states:
        flags = np.stack([found.flags(name, state, kind) for kind in KINDS], axis=1)  # [S,2,N]
        resampled.append(found.resampling(flags.shape[0], flags.shape[2]).means(flags))
    return means, np.stack(resampled, axis=1)
