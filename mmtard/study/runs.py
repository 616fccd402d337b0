"""The runs of a study: each method at each setting with each seed, a configuration and a folder each. No torch."""

from __future__ import annotations

import difflib
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from .. import config as settings, resources
from ..config import Config
from ..config.values import Int
from ..config.yaml_tree import merge, read_tree
from ..errors import UserError
from ..files import settings_digest
from .grid import dotted, names_of, refuse_one_name
from .places import refuse_unknown_places
from .schema import Contender, Settings, Study, Trained

RUNS, MODELS = "runs", "models"  # folders of a study
PARTS = 10  # checkpoints of a run that is not measured on the way: what a kill may cost is a part
# What a run of a study does without: they cost time that would count as the method's.
QUIET = {"log": {"tensorboard": False, "wandb": None}, "probe": None}
STEPS = TypeAdapter(Annotated[Int, Field(ge=1)])


@dataclass(frozen=True)
class Choice:
    """A combination of the values that are tuned. name: what it sets, as a part of a path; "" where it sets nothing."""

    settings: Settings
    name: str

    @property
    def label(self) -> str:
        """What it sets, in words."""
        return _label(self.settings)


@dataclass(frozen=True)
class Point(Choice):
    """A setting of the front, the same for every method. number: its place; 0 is the main table's."""

    number: int


@dataclass(frozen=True)
class Run:
    """A training of the comparison."""

    method: str
    point: Point
    choice: Choice
    seed: int

    @property
    def name(self) -> str:
        """Its place below STUDY/runs."""
        return "/".join(filter(None, (self.method, self.point.name, self.choice.name, f"seed-{self.seed}")))

    @property
    def words(self) -> str:
        """Its name for people."""
        return ", ".join(filter(None, (self.method, self.point.label, self.choice.label, f"seed {self.seed}")))


def points(study: Study) -> list[Point]:
    """Every setting that fronts are drawn over; the first is the main table's."""
    merged = [_joined(parts) for parts in itertools.product(*study.grid.vary)]
    return [Point(one, name, number=i) for i, (one, name) in enumerate(zip(merged, names_of(merged)))]


def points_of(study: Study, method: str) -> list[Point]:
    """The settings that a method is run at: one that ablates another, at the main table's alone."""
    return points(study)[:1] if study.methods[method].ablates else points(study)


def choices(study: Study) -> list[Choice]:
    """Every combination of the values that are tuned."""
    tune = study.grid.tune
    every = [dict(zip(tune, values)) for values in itertools.product(*tune.values())]
    return [Choice(one, name) for one, name in zip(every, names_of(every))]


def tuning_runs(study: Study) -> list[Run]:
    """The runs that settings are chosen by: the first seed of every method at every combination."""
    at = points(study) if study.grid.tune_each else points(study)[:1]
    return [
        Run(method, point, choice, study.seeds[0])
        for point in at
        for method in study.methods
        if point in points_of(study, method)
        for choice in choices(study)
    ]


def all_runs(study: Study) -> dict[str, Run]:
    """Name -> every run that the study may come to have, whatever is chosen."""
    every = [
        Run(method, *rest)
        for method in study.methods
        for rest in itertools.product(points_of(study, method), choices(study), study.seeds)
    ]
    return {run.name: run for run in every}


def run_folder(study: Study, run: Run) -> Path:
    """The folder of a run, in that of the study."""
    return Path(study.out) / RUNS / run.name


def model_folder(study: Study, name: str) -> Path:
    """The folder of a model that is measured as it is, in that of the study."""
    return Path(study.out) / MODELS / name


def configuration(study: Study, run: Run) -> Config:
    """The resolved configuration of a run. Raises UserError that names the method and the setting that does not fit."""
    method = study.methods[run.method]
    tree = merge(_base(study, method), method.settings)
    if "method" not in tree:
        near = difflib.get_close_matches(run.method, [name for name in study.methods if name != run.method], n=1)
        hint = f", or did you mean '{near[0]}'?" if near else ""
        raise UserError(f"methods.{run.method}: has no settings.method, such as {{name: tecoa}}{hint}")
    for key, value in {**run.point.settings, **run.choice.settings}.items():
        tree = merge(tree, _nested(key, value))  # a section lies over what there is of it, as in `settings`
    tree |= {"seed": run.seed, "run_dir": str(run_folder(study, run))}
    return _validated(f"methods.{run.method}", _with_own(study, tree, measured=True))


def model_configuration(study: Study, name: str) -> Config:
    """The resolved configuration of a model that is trained once. Raises UserError that names it."""
    model = study.models[name]
    tree = merge(_base(study, model), model.settings)
    tree["run_dir"] = str(model_folder(study, name))
    return _validated(f"models.{name}", _with_own(study, tree, measured=False))


def check(study: Study) -> None:
    """Raise UserError where a configuration does not fit, or methods are not compared at one budget and one grid.

    Also where two settings would share a folder, or mean the same trainings.
    """
    refuse_unknown_places(study)
    refuse_one_name("grid.vary", [(point.name, point.settings) for point in points(study)])
    refuse_one_name("grid.tune", [(choice.name, choice.settings) for choice in choices(study)])
    for name in study.models:
        model_configuration(study, name)
    fixed = {*study.grid.tune, *(key for axis in study.grid.vary for one in axis for key in one)}
    for name, method in study.methods.items():
        for key in sorted(fixed & set(dotted(method.settings))):
            raise UserError(
                f"methods.{name}.settings: sets {key}, which the grid sets for every method; remove it there"
            )
    _refuse_twins(study)
    trained: dict[str, Settings] = {}  # what all methods' trainings at a setting are -> the setting
    for point in points(study):
        budgets: dict[tuple, str] = {}
        for choice in choices(study):
            configs = {m: configuration(study, Run(m, point, choice, study.seeds[0])) for m in study.methods}
            for method, config in configs.items():
                _refuse_no_average(study, method, config)
                budgets.setdefault((config.train.steps, config.train.batch_size), method)
            _refuse_again(trained, {**point.settings, **choice.settings}, configs)
        if len(budgets) > 1:
            told = ", ".join(f"methods.{m} trains {s} steps of {b} images" for (s, b), m in list(budgets.items())[:2])
            raise UserError(
                f"{told}; compare methods at one budget: give all the same train.steps and train.batch_size"
            )


def checkpoints(study: Study, steps: int) -> list[int]:
    """The steps at which a run of so many is measured on the way, the last one included; [] without a curve."""
    if study.curve is None:
        return []
    every = max(1, steps // study.curve.points)
    return [*range(every, steps - every // 2, every), steps]


# ---------------------------------------------------------------- the parts


def _base(study: Study, of: Contender | Trained) -> Settings:
    named = of.configuration or study.configuration
    tree = read_tree(resources.find_config(named)) if named else {}
    return merge(tree, study.settings)


def _with_own(study: Study, tree: Settings, measured: bool) -> Settings:
    """With what the study sets itself, whatever the grid did to the sections it is in."""
    tree = merge(tree, QUIET)
    try:
        steps = STEPS.validate_python(tree["train"]["steps"])  # 10.0 are 10, as they are to the configuration
    except (KeyError, TypeError, ValidationError):
        return tree  # the schema names what is wrong with it
    at = checkpoints(study, steps) if measured else []
    every = at[0] if at else -(-steps // PARTS)
    return merge(tree, {"checkpoint": {"every": every, "keep_every": every if at else None}})


def _refuse_no_average(study: Study, method: str, config: Config) -> None:
    if study.methods[method].ema and config.train.ema is None:
        raise UserError(
            f"methods.{method}.ema: its runs keep no moving average of weights; set methods.{method}.settings."
            "train.ema, such as 0.99, or leave ema out"
        )


def _refuse_again(trained: dict[str, Settings], one: Settings, configs: dict[str, Config]) -> None:
    """Raise UserError where every method's training is one that an earlier setting gave; note it otherwise.

    That a single method's is so is no mistake: it may have by default what a point sets for all.
    """
    same = settings_digest({m: config.model_dump(mode="json", exclude={"run_dir"}) for m, config in configs.items()})
    if same in trained:
        other = trained[same]
        told = [_apart(other, one), _apart(one, other)]
        raise UserError(f"grid: {told[0]} and {told[1]} mean the same training; list it once")
    trained[same] = one


def _refuse_twins(study: Study) -> None:
    """Raise UserError where two methods are one training, measured alike: they would count as two contenders."""
    seen: dict[tuple, str] = {}
    for name, method in study.methods.items():
        config = configuration(study, Run(name, points(study)[0], choices(study)[0], study.seeds[0]))
        same = settings_digest(config.model_dump(mode="json", exclude={"run_dir"})), method.ema
        if same in seen:
            raise UserError(f"methods: {seen[same]} and {name} have the same settings; leave one out")
        seen[same] = name


def _apart(one: Settings, other: Settings) -> str:
    differ = {key: value for key, value in one.items() if key not in other or repr(other[key]) != repr(value)}
    return ", ".join(f"{key}={value}" for key, value in differ.items()) or "no setting"


def _validated(where: str, tree: Settings) -> Config:
    try:
        return settings.validate(tree)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _nested(key: str, value: Settings) -> Settings:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def _joined(parts: tuple[Settings, ...]) -> Settings:
    joined: Settings = {}
    for part in parts:
        joined |= part
    return joined


def _label(one: Settings) -> str:
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in one.items())
