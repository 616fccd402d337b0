"""Which of the tuned settings a method is run with, and which method is the baseline: by validation data alone."""

from __future__ import annotations

from dataclasses import dataclass

from .collect import KINDS, Outcome, outcome, same_samples
from .measures import evaluation
from .runs import Choice, Run, choices, points, points_of, tuning_runs
from .schema import Study


@dataclass(frozen=True)
class Tuned:
    """A method at a point of the front: its score at each combination of the grid, in [0,1], and the one that won.

    scores: Choice's label -> the mean of all clean and robust accuracies on the validation data.
    at_edge: the tuned keys whose chosen value is the first or the last of the grid: a better one may lie beyond.
    """

    run: Run
    scores: dict[str, float]
    at_edge: list[str]

    @property
    def score(self) -> float:
        """The score of the chosen values; 0 where they have none."""
        return self.scores.get(self.run.choice.label, 0.0)


def _scores(study: Study, runs: list[Run]) -> list[float | None]:
    """The mean of all clean and robust accuracies of each run on the validation data; None where one is missing.

    Raises UserError where two runs were measured on other samples.
    """
    by_name = {
        name: {run.name: outcome(evaluation(study, run, f"validation-{name}", measure)) for run in runs}
        for name, measure in study.validation.items()
    }
    for found in by_name.values():
        same_samples({run: one for run, one in found.items() if one is not None})
    return [_mean([found[run.name] for found in by_name.values()]) for run in runs]


def _mean(found: list[Outcome | None]) -> float | None:
    known = [one.accuracy(kind) for one in found if one is not None for kind in KINDS]
    return sum(known) / len(known) if known and None not in found else None


def chosen(study: Study) -> dict[tuple[str, int], Tuned]:
    """(method, number of a point) -> its tuned settings, for all methods whose tuning is complete.

    Of equal scores the first in the grid wins.
    """
    only = choices(study)[0]
    if not study.needs_tuning:
        first = [Run(method, points(study)[0], only, study.seeds[0]) for method in study.methods]
        known = dict(zip(study.methods, _scores(study, first)))
        return {
            (method, point.number): Tuned(
                Run(method, point, only, study.seeds[0]),
                {} if known[method] is None else {only.label: known[method]},
                [],
            )
            for method in study.methods
            for point in points_of(study, method)
        }
    scores: dict[tuple[str, int], dict[int, float | None]] = {}
    runs = tuning_runs(study)
    for (i, run), value in zip(enumerate(runs), _scores(study, runs)):
        scores.setdefault((run.method, run.point.number), {})[i] = value
    found = {}
    for (method, number), by_place in scores.items():
        if any(value is None for value in by_place.values()):
            continue
        best = max(by_place, key=lambda i: (by_place[i], -i))
        labelled = {runs[i].choice.label: value for i, value in by_place.items()}
        found[method, number] = Tuned(runs[best], labelled, _at_edge(study, runs[best].choice))
    if not study.grid.tune_each:
        for (method, _), at_first in list(found.items()):
            for point in points_of(study, method)[1:]:
                run = Run(method, point, at_first.run.choice, study.seeds[0])
                found[method, point.number] = Tuned(run, at_first.scores, at_first.at_edge)
    return found


def best_baseline(study: Study, tuned: dict[tuple[str, int], Tuned]) -> str:
    """The method with one teacher or none that scores best on the validation data at the main table's settings."""
    among = [name for name, method in study.methods.items() if method.baseline and (name, 0) in tuned]
    return max(among, key=lambda name: (tuned[name, 0].score, -among.index(name)))


def _at_edge(study: Study, choice: Choice) -> list[str]:
    edges = {key: (values[0], values[-1]) for key, values in study.grid.tune.items() if len(values) > 1}
    return [key for key, ends in edges.items() if choice.settings[key] in ends]
