"""All that a study's page says, as arrays: outcomes by method, setting and seed, and how methods differ."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ..config import Config
from .choose import Tuned, best_baseline, chosen
from .collect import Cost, Outcome, cost, outcome, same_samples
from .crossed import Difference, difference_over_seeds, holm
from .efficiency import Trajectory
from .front import Resampling
from .measures import evaluation, of_model, on_the_way
from .runs import Point, Run, configuration, points, run_folder, tuning_runs
from .schema import START, Study
from .worker import stored_seconds


@dataclass(frozen=True)
class State:
    """A setting of a method, with the runs of it that were measured, one a seed."""

    method: str
    label: str
    runs: tuple[Run, ...]
    point: Point
    tuned: bool  # at the settings that were chosen for this point of the front

    @property
    def main(self) -> bool:
        """Whether it is of the main table: the first point, at the tuned settings."""
        return self.tuned and self.point.number == 0


@dataclass
class Findings:
    """What was measured so far. Methods without a complete run are left out, and named in `missing`."""

    study: Study
    tuned: dict[tuple[str, int], Tuned]
    outcomes: dict[tuple[str, str], Outcome] = field(default_factory=dict)  # (evaluation, run's name)
    models: dict[tuple[str, str], Outcome] = field(default_factory=dict)  # (evaluation, model)
    states: list[State] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    gains: dict[tuple[str, str], object] = field(default_factory=dict, repr=False)  # what `gains.py` has computed
    _draws: dict[tuple[int, int], Resampling] = field(default_factory=dict, repr=False)

    @property
    def main(self) -> dict[str, State]:
        """Method -> its state of the main table, in the study's order."""
        return {state.method: state for state in self.states if state.main}

    @property
    def tuned_states(self) -> list[State]:
        """The state of each method at each point of the front, at the settings chosen there; the main table's first."""
        return sorted((state for state in self.states if state.tuned), key=lambda state: state.point.number)

    def front_states(self, method: str) -> list[State]:
        """The settings that the front of a method is judged by: those with as many seeds as any setting has.

        A combination that only the tuning tried has one seed, whose luck no interval would show.
        """
        most = max((len(state.runs) for state in self.states), default=0)
        return [state for state in self.states if state.method == method and len(state.runs) == most]

    def front_points(self, method: str) -> set[int]:
        """The points of the grid that the front of a method is drawn over so far."""
        return {state.point.number for state in self.front_states(method)}

    @property
    def front_methods(self) -> list[str]:
        """The methods that have a front: an ablation, which is run at the main table's setting alone, has none."""
        return [m for m, method in self.study.methods.items() if method.ablates is None and self.front_states(m)]

    def label(self, state: State) -> str:
        """How tables call a state: its method, and the point of the front where it is not the main table's."""
        label = self.study.labels[state.method]
        return label if state.main else f"{label}, {state.point.label}"

    @cached_property
    def baseline(self) -> str | None:
        """The best method with one teacher or none; None where none of them has runs."""
        known = {key: value for key, value in self.tuned.items() if key[0] in self.main}
        among = [name for name in self.main if self.study.methods[name].baseline]
        return best_baseline(self.study, known) if among else None

    def flags(self, name: str, state: State, kind: str, runs: tuple[Run, ...] | None = None) -> np.ndarray:
        """[S,N] bool: which samples of an evaluation each seed of a state is right on."""
        return np.stack([self.outcomes[name, run.name].flags(kind) for run in runs or state.runs])

    def accuracy(self, name: str, state: State, kind: str) -> float:
        """The mean accuracy of a method's state over its seeds and samples. kind: clean or robust."""
        return float(self.flags(name, state, kind).mean())

    def difference(self, name: str, kind: str, method: str, other: str) -> Difference | None:
        """How a method differs from another in the main table, over the seeds that both have; None without any."""
        return self.between(name, kind, self.main.get(method), self.main.get(other))

    def at_point(self, number: int) -> dict[str, State]:
        """Method -> its state at a point of the front, at the settings that were chosen for it."""
        return {state.method: state for state in self.states if state.tuned and state.point.number == number}

    def between(self, name: str, kind: str, b: State | None, a: State | None) -> Difference | None:
        """How state b differs from state a, over the seeds that both have; None without any."""
        if a is None or b is None:
            return None
        seeds = [run.seed for run in a.runs if run.seed in {r.seed for r in b.runs}]
        if not seeds:
            return None
        pair = [tuple(run for seed in seeds for run in s.runs if run.seed == seed) for s in (a, b)]
        return difference_over_seeds(self.flags(name, a, kind, pair[0]), self.flags(name, b, kind, pair[1]))

    def against(self, other: str, name: str, kind: str) -> dict[str, tuple[Difference, float]]:
        """Method -> (difference from `other`, Holm's p over all of these methods)."""
        found = {m: self.difference(name, kind, m, other) for m in self.main if m != other}
        found = {m: d for m, d in found.items() if d is not None}
        adjusted = holm([d.p for d in found.values()])
        return {m: (d, p) for (m, d), p in zip(found.items(), adjusted)}

    def cost(self, run: Run) -> Cost:
        """What a run took."""
        config = configuration(self.study, run)
        train, storing = config.train, self._storing(_stored(config))
        return cost(run_folder(self.study, run), train.steps, train.batch_size, storing)

    def _storing(self, read: set[tuple[str, str]]) -> float | None:
        """Seconds that it took to store what a method reads: of the first run that read as much, or more.

        None where no run of this study's own stored any of it, such as on a cluster, where a job does.
        """
        if not read:
            return 0.0
        alike = [
            run
            for state in self.states
            if read <= _stored(configuration(self.study, state.runs[0]))
            for run in state.runs
        ]
        return max((stored_seconds(self.study, run.name) for run in alike), default=0.0) or None

    def trajectory(self, state: State, over: str, kind: str = "robust") -> Trajectory | None:
        """A method's way over `seconds` or `images`, over the seeds that have all of it; None where none has."""
        costs, flags, seeds = [], [], []
        for run in state.runs:
            way = on_the_way(self.study, run)
            found = [outcome(one) for one in way]
            if not way or any(one is None for one in found):
                continue
            spent, batch = self.cost(run), configuration(self.study, run).train.batch_size
            steps = [int(one.out.name.split("-")[1]) for one in way]
            seconds = [(spent.stored or 0.0) + spent.by_step.get(step, spent.seconds) for step in steps]
            if over == "seconds" and np.isnan(seconds).any():
                continue
            costs.append(seconds if over == "seconds" else [step * batch for step in steps])
            flags.append([one.flags(kind) for one in found])
            seeds.append(run.seed)
        return Trajectory(np.array(costs, dtype=float), np.array(flags), tuple(seeds)) if costs else None

    def resampling(self, seeds: int, samples: int) -> Resampling:
        """The draws for so many seeds and samples, the same whenever it is asked."""
        key = seeds, samples
        if key not in self._draws:
            self._draws[key] = Resampling.draw(self.study.front.resamples, seeds, samples)
        return self._draws[key]


def collect(study: Study) -> Findings:
    """Everything that is there. Raises UserError for damaged results, or models measured on other samples."""
    found = Findings(study, chosen(study))
    for name in [START, *study.models]:
        for evaluated, one in zip(study.evaluations, of_model(study, name)):
            if (result := outcome(one)) is not None:
                found.models[evaluated, name] = result
    by_setting: dict[tuple, list[Run]] = {}
    for run in _runs(study, found.tuned):
        results = {n: outcome(evaluation(study, run, n, m)) for n, m in study.evaluations.items()}
        if all(one is not None for one in results.values()):
            by_setting.setdefault((run.method, run.point.number, run.choice.name), []).append(run)
            found.outcomes |= {(n, run.name): one for n, one in results.items()}
        else:
            found.missing.append(run.words)
    for (method, number, choice), runs in by_setting.items():
        won = found.tuned.get((method, number))
        at_tuned = won is not None and won.run.choice.name == choice
        label = ", ".join(filter(None, (runs[0].point.label, runs[0].choice.label)))
        found.states.append(State(method, label, tuple(runs), runs[0].point, at_tuned))
    order = {method: i for i, method in enumerate(study.methods)}
    found.states.sort(key=lambda state: (order[state.method], not state.main))
    for name in study.evaluations:
        of_this = {run: one for (n, run), one in {**found.outcomes, **found.models}.items() if n == name}
        same_samples(of_this)
    return found


def _stored(config: Config) -> set[tuple[str, str]]:
    """The teachers whose embeddings a run reads, by name and weights."""
    return {(name, teacher.weights) for name, teacher in config.teachers.items() if teacher.stored}


def _runs(study: Study, tuned: dict[tuple[str, int], Tuned]) -> list[Run]:
    """The runs that the study has or is to have, as far as settings are chosen."""
    runs = tuning_runs(study) if study.needs_tuning else []
    for point in points(study):
        for method in study.methods:
            if (method, point.number) in tuned:
                won = tuned[method, point.number].run
                runs += [Run(method, point, won.choice, seed) for seed in study.seeds]
    return list({run.name: run for run in runs}.values())
