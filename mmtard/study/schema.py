"""What a study is: data, models, methods, the grid that every method is tuned on, seeds, evaluations. No torch."""

from __future__ import annotations

import math
import os
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ..config.values import Int, Number, PathText, Pixels, Section
from .grid import Settings, refuse_own

NAME = r"^[A-Za-z0-9][\w.+-]*$"
Name = Annotated[str, Field(pattern=NAME, max_length=60)]


def _number(value: Any) -> Any:
    """`1e-3`, which YAML takes for a text, as the number it is, so that a value has one name; all else as it stands."""
    is_number = isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d{1,2}", value, re.ASCII)
    return float(value) if is_number else value


Value = Annotated[Any, BeforeValidator(_number)]
LEARNING_RATE = "train.lr"
START = "start"  # the student before any training, measured like the models
MOST_RUNS = 20_000  # that a study may come to have


class Material(Section):
    """Data that are made for the study, below STUDY/data."""

    maker: str = Field(
        ..., description="`shapes` renders images, `cifar` splits CIFAR-10 and CIFAR-100, `shards` shards of yours"
    )
    source: PathText | None = Field(None, description="the folder that the maker reads; null: it needs none")
    options: dict[str, Any] = Field({}, description="sizes of the splits, seeds: as the maker takes them")


class Pretraining(Section):
    """A CLIP that is pretrained on captions, once, into STUDY/pretrained/NAME."""

    architecture: PathText = Field(..., description="a .json model config, or the name of one that comes with mmtard")
    data: PathText = Field(
        ..., description="with a split train/ of captioned images: {study}/data/images, or a folder of yours"
    )
    steps: Int = Field(300, ge=1, description="updates")
    batch_size: Int = Field(256, ge=2, description="pairs of an update")
    lr: Number = Field(1e-3, gt=0, description="largest learning rate, of one cycle")
    seed: Int = Field(0, ge=0, description="of the weights and the order")


class Trained(Section):
    """A model that is trained once, before the methods: a teacher."""

    configuration: PathText | None = Field(None, description="file that it builds on; null: the study's")
    settings: Settings = Field({}, description="over the study's own: sections and keys as in a configuration")


class Contender(Section):
    """A method of the comparison."""

    label: str | None = Field(None, min_length=1, description="how tables call it; null: its key")
    configuration: PathText | None = Field(None, description="file that it builds on; null: the study's")
    settings: Settings = Field({}, description="over the study's own: sections and keys as in a configuration")
    baseline: bool = Field(
        False, description="it has one teacher or none; differences are taken from the best of these"
    )
    ablates: str | None = Field(None, description="the method that it is but for one part; null: none")
    ema: bool = Field(False, description="measure its moving average of weights, which its settings.train.ema keeps")


class Grid(Section):
    """The settings of every method: those that are tuned, and those that its front is drawn over."""

    tune: dict[str, list[Value]] = Field(
        ..., description="dotted key -> values; the best combination of each method is chosen on `validation`"
    )
    vary: list[list[dict[str, Value]]] = Field(
        [], description="axes of the front: each a list of dotted settings, the first of which is the main table's"
    )
    tune_each: bool = Field(False, description="tune at each point of `vary`, not at the first alone")


class Measure(Section):
    """A dataset, and how it is attacked."""

    data: PathText = Field(..., description="a dataset as `mmtard evaluate --data` takes it")
    protocol: str = Field("quick", description="a protocol of `mmtard evaluate`, which what follows changes")
    eps: Pixels = Field(..., gt=0, lt=1, description="radius of the attacks, L-inf, in units of [0,1]")
    attacks: list[str] | None = Field(None, min_length=1, description="in their order; null: the protocol's")
    iters: Int | None = Field(None, ge=1, description="of each gradient attack; null: the protocol's")
    n_samples: Annotated[Int, Field(ge=1)] | Literal["all"] | None = Field(
        None, description="that are attacked; null: the protocol's"
    )
    seed: Int = Field(0, ge=0, description="of the sample and the attacks' starts")
    templates: list[str] | None = Field(None, min_length=1, description="prompts; null: those of the training")
    batch_size: Int = Field(128, ge=1, description="images that are attacked at once")


class Curve(Section):
    """Accuracy on the way: checkpoints of the tuned runs, measured when the training is over."""

    measure: Measure
    points: Int = Field(8, ge=2, le=1000, description="checkpoints, evenly over the steps of a run")
    against: str | None = Field(
        None, description="the method whose final robust accuracy is to be reached; null: the best baseline"
    )


class Front(Section):
    """Clean against robust accuracy over all settings."""

    reference: tuple[Number, Number] = Field(
        (0.0, 0.0), description="the corner, clean and robust in [0,1], from which the dominated area counts"
    )
    resamples: Int = Field(2000, ge=100, le=100_000, description="of the bootstrap over seeds and samples")


class Study(Section):
    """A study: what `mmtard study` reads. `{study}` in a text stands for its folder, `{source}` for data.source."""

    title: str = Field(..., min_length=1, description="of the page")
    question: str = Field("", description="what the study is to answer, in a sentence")
    out: PathText = Field(..., description="the study's own folder, which is made; --out names another")
    data: Material | None = Field(None, description="null: nothing is made, the settings name shards of yours")
    pretrain: dict[Name, Pretraining] = Field({}, description="name -> a CLIP to begin from")
    configuration: PathText | None = Field(None, description="file that every run builds on; null: `settings` is all")
    settings: Settings = Field({}, description="of every run: sections and keys as in a configuration")
    models: dict[Name, Trained] = Field({}, description="name -> a teacher, trained into STUDY/models/NAME, in order")
    methods: dict[Name, Contender] = Field(..., min_length=1, description="name -> a method of the comparison")
    grid: Grid
    seeds: list[Int] = Field(..., min_length=1, description="of each method's runs at its tuned settings")
    validation: dict[Name, Measure] = Field(
        {}, description="what settings are chosen by: the mean of all clean and robust accuracies; in no table"
    )
    evaluations: dict[Name, Measure] = Field(..., min_length=1, description="name -> what tables and fronts show")
    curve: Curve | None = Field(None, description="null: no accuracy over time")
    front: Front = Front()
    ranks: Int = Field(1, ge=1, le=1024, description="processes of a training on this machine")
    at_once: Int = Field(1, ge=1, le=1024, description="runs side by side on this machine")
    threads: Int = Field(1, ge=1, le=1024, description="of a process; on a CPU the last digits depend on it")

    @property
    def needs_tuning(self) -> bool:
        """Whether any combination is to be chosen at all."""
        return any(len(values) > 1 for values in self.grid.tune.values())

    @property
    def labels(self) -> dict[str, str]:
        """Method -> how tables call it."""
        return {name: method.label or name for name, method in self.methods.items()}

    @model_validator(mode="after")
    def _grid_is_fair(self):
        grid = self.grid
        if LEARNING_RATE not in grid.tune:
            raise ValueError(
                f"grid.tune: has no {LEARNING_RATE}, which decides more than most methods do; "
                f"list values of it, such as {LEARNING_RATE}: [1e-3, 4e-3]"
            )
        for key, values in grid.tune.items():
            for value in values:
                refuse_own("grid.tune", {key: value})
            if not values or len({str(v) for v in values}) < len(values):
                raise ValueError(f"grid.tune.{key}: {values}: list each value once, and at least one")
        earlier: set[str] = set()
        for i, axis in enumerate(grid.vary):
            if not axis:
                raise ValueError(f"grid.vary.{i}: the axis has no settings; list some, or remove it")
            for one in axis:
                refuse_own(f"grid.vary.{i}", one)
            if len({str(one) for one in axis}) < len(axis):
                raise ValueError(f"grid.vary.{i}: {axis}: list each of its settings once")
            keys = {key for one in axis for key in one}
            for key in sorted(keys & set(grid.tune)):
                raise ValueError(f"grid.vary.{i}: sets {key}, which grid.tune chooses; leave it to one of them")
            for key in sorted(keys & earlier):
                raise ValueError(f"grid.vary.{i}: sets {key}, which an earlier axis sets; leave it to one of them")
            earlier |= keys
        combinations = math.prod(map(len, [*grid.tune.values(), *grid.vary])) * len(self.methods) * len(self.seeds)
        if combinations > MOST_RUNS:
            raise ValueError(
                f"grid: {combinations} trainings of {len(self.methods)} methods and {len(self.seeds)} seeds, more than "
                f"{MOST_RUNS}; list fewer values"
            )
        if self.needs_tuning and not self.validation:
            raise ValueError("validation: several values in grid.tune need data to choose by, which no table shows")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: {self.seeds}: name each seed once")
        return self

    @model_validator(mode="after")
    def _settings_count(self):
        refuse_own("settings", self.settings, ("seed",) if self.models else ())  # that of the models' trainings
        for name, model in self.models.items():
            refuse_own(f"models.{name}.settings", model.settings, ("seed",))
        for name, method in self.methods.items():
            refuse_own(f"methods.{name}.settings", method.settings)
        return self

    @model_validator(mode="after")
    def _names_are_known(self):
        if START in self.models:
            raise ValueError(f"models.{START}: so the student before any training is called; give it another name")
        for name, method in self.methods.items():
            if method.ablates is not None and (method.ablates not in self.methods or method.ablates == name):
                raise ValueError(
                    f"methods.{name}.ablates: '{method.ablates}' is no other method; known: {', '.join(self.methods)}"
                )
        if self.curve and self.curve.against is not None and self.curve.against not in self.methods:
            raise ValueError(f"curve.against: '{self.curve.against}' is no method; known: {', '.join(self.methods)}")
        if not any(method.baseline for method in self.methods.values()):
            raise ValueError("methods: none is a baseline; mark those of one teacher or none with baseline: true")
        labels = list(self.labels.values())
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"methods: two are called '{label}'; give each a label of its own")
        measured = {os.path.normpath(measure.data) for measure in self.evaluations.values()}
        for name, measure in self.validation.items():
            if os.path.normpath(measure.data) in measured:
                raise ValueError(
                    f"validation.{name}.data: '{measure.data}' is in `evaluations`, too; settings must be chosen on "
                    "data that no table shows"
                )
        return self
