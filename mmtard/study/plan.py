"""What of a study is done and what is missing, seen from its folder alone. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from .. import config as settings
from ..config import Config
from ..errors import UserError
from ..evaluation.table import print_table
from ..launch.plan import steps_done
from ..runs import manifest
from ..runs.layout import CONFIG
from .measures import Measurement, of_model, of_run
from .runs import Run, all_runs, configuration, model_configuration, points, tuning_runs
from .schema import START, Study
from .worker import MEASURE, OF_MODEL, STORE, TRAIN

TUNING, SEEDS, TEACHERS, STARTS = "tuning", "seeds", "models", "start"


@dataclass(frozen=True)
class Item:
    """A training and its measurements. config: None where nothing is trained. asked: what a worker is told of it."""

    phase: str
    words: str
    config: Config | None
    measured: list[Measurement]
    asked: dict

    @property
    def trained(self) -> bool:
        """Whether all its steps are done, or there are none."""
        return self.config is None or steps_done(Path(self.config.run_dir)) >= self.config.train.steps

    @property
    def damaged(self) -> str:
        """What is wrong with the newest checkpoint of a training that goes on from an earlier one; "" otherwise."""
        if self.trained or self.config is None:
            return ""
        whole, reasons = manifest.newest(Path(self.config.run_dir))
        return f"{reasons[0]}; its training goes on from {whole.name}" if whole and reasons else ""

    @property
    def to_measure(self) -> int:
        """Measurements that are not done."""
        return sum(not one.done for one in self.measured)

    @property
    def done(self) -> bool:
        """Whether it is trained and measured."""
        return self.trained and not self.to_measure

    @property
    def state(self) -> str:
        """In words, for the table of what is done."""
        if not self.trained and self.config:
            steps = steps_done(Path(self.config.run_dir))
            at = f"{steps} of {self.config.train.steps} steps" if steps else "to train"
            return f"{at}; {self.damaged}" if self.damaged else at
        if self.to_measure:
            return f"{'trained; ' if self.config else ''}{self.to_measure} of {len(self.measured)} to measure"
        return "done"

    def check_settings(self) -> None:
        """Raise UserError where the folder holds a run that was made with other settings."""
        if self.config is None or not (Path(self.config.run_dir) / CONFIG).is_file():
            return
        differ = settings.differences(settings.load(Path(self.config.run_dir) / CONFIG), self.config)
        differ = {k: v for k, v in differ.items() if not k.startswith("checkpoint.")} if self.trained else differ
        if differ:
            key, (old, new) = next(iter(differ.items()))
            raise UserError(
                f"'{self.config.run_dir}' was made with {key} {old}, and the study now says {new}; "
                "name another folder with --out, or remove that run"
            )

    @property
    def key(self) -> str:
        """Its name on a command line that measures it alone: `model:NAME`, `tuning:RUN`, `seeds:RUN`."""
        return f"{'model' if self.asked.get(OF_MODEL) else self.phase}:{self.asked['name']}"

    def work(self, kind: str) -> dict:
        """What a worker is told, of one of the kinds of work."""
        return {**self.asked, "work": kind}

    @property
    def works(self) -> list[dict]:
        """What is missing of it, in order."""
        kinds = [] if self.trained else [*([STORE] if self.reads_stored else []), TRAIN]
        kinds += [MEASURE] if self.measured and (self.to_measure or not self.trained) else []
        return [self.work(kind) for kind in kinds]

    @property
    def reads_stored(self) -> bool:
        """Whether it reads embeddings of teachers, which are stored before it is trained."""
        return self.config is not None and any(teacher.stored for teacher in self.config.teachers.values())


def model_items(study: Study) -> list[Item]:
    """The models that are trained once, in their order, and the student before any training."""
    found = []
    for name in study.models:
        config = model_configuration(study, name)
        found.append(Item(TEACHERS, name, config, of_model(study, name), {"name": name, OF_MODEL: True}))
    found.append(Item(STARTS, START, None, of_model(study, START), {"name": START, OF_MODEL: True}))
    return found


def model_groups(study: Study) -> list[list[Item]]:
    """The models in groups that may be trained side by side: one that another learns from is in an earlier group."""
    groups: list[list[Item]] = [[]]
    for item in model_items(study):
        earlier = [Path(one.config.run_dir).resolve() for one in groups[-1] if one.config]
        if any(weights.is_relative_to(run) for weights in _weights(item.config) for run in earlier):
            groups.append([])
        groups[-1].append(item)
    return groups


def _weights(config: Config | None) -> list[Path]:
    """Where the models lie that a training begins with or learns from."""
    models = [config.student, *config.teachers.values()] if config else []
    return [Path(model.weights).resolve() for model in models]


def run_item(study: Study, run: Run, phase: str, chosen: bool) -> Item:
    """chosen: whether the run stands at its method's tuned settings, and so is measured on the way, too."""
    only_one = not study.needs_tuning and run.seed == study.seeds[0] and run.point.number == 0
    tuning = phase == TUNING or only_one  # validation data also choose the baseline
    asked = {"name": run.name, "tuning": tuning, "chosen": chosen}
    return Item(phase, run.words, configuration(study, run), of_run(study, run, tuning, chosen), asked)


def tuning_items(study: Study) -> list[Item]:
    """The runs that settings are chosen by; none where nothing is to be chosen."""
    return [run_item(study, run, TUNING, False) for run in tuning_runs(study)] if study.needs_tuning else []


def seed_items(study: Study, chosen: dict[tuple[str, int], Run]) -> list[Item]:
    """Every seed of the methods whose settings are chosen: {(method, point's number): the run that won}."""
    found = []
    for point in points(study):
        for method in study.methods:
            won = chosen.get((method, point.number))
            if won is not None:
                found += [run_item(study, Run(method, point, won.choice, seed), SEEDS, True) for seed in study.seeds]
    return found


def asked_by_key(study: Study, key: str) -> dict:
    """What a worker is told of the item of a key. Raises UserError for one that the study has not."""
    phase, _, name = key.partition(":")
    if phase == "model" and name in (START, *study.models):
        return {"name": name, OF_MODEL: True}
    run = all_runs(study).get(name)
    if run is None or phase not in (TUNING, SEEDS):
        raise UserError(f"--measure: '{key}' is nothing of this study; it is what a job of this study passes")
    return run_item(study, run, phase, phase == SEEDS).asked


def show(study: Study, items: list[Item]) -> None:
    """Print what is done and what is missing, a line for each training."""
    table = Table(title=study.title)
    for column in ("part", "training", "state"):
        table.add_column(column)
    before = ""
    for item in items:
        table.add_row(item.phase if item.phase != before else "", item.words, item.state)
        before = item.phase
    print_table(table)
    trainings = sum(not item.trained for item in items)
    measurements = sum(item.to_measure for item in items)
    print(f"{len(items)} in all; {trainings} to train, {measurements} measurements missing")
