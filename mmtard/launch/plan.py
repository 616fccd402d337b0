"""What a command line asks for, as stages: each is one job, or one job array, after others."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

from .. import config as settings
from ..config import Config
from ..data.paths import check_openers, expand_shards
from ..embeddings.settings import embedding_recipe, stored_teachers
from ..errors import UserError
from ..files import slug
from ..runs import layout, manifest

# Of the student's overrides, those that say where data and devices are; the rest is the student's own.
SHARED = ("data.shards", "data.index", "data.classnames", "data.cache", "engine.device", "log")


@dataclass(frozen=True)
class Work:
    """One run of mmtard: a training or a storing of embeddings, which have a `config`, or the evaluation of a run."""

    run_dir: Path
    config: Config | None
    words: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What the job is called: a training after its run folder, other work with its command in front."""
        return self.run_dir.name if self.words[0] == "train" else f"{self.words[0]}-{self.run_dir.name}"

    @property
    def job_name(self) -> str:
        """What Slurm calls a job of this work alone."""
        return f"mmtard-{self.name}"


@dataclass(frozen=True)
class Stage:
    """Works that are submitted together, once the trainings of the run folders `after` have ended well."""

    title: str
    works: tuple[Work, ...]
    after: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What is submitted: stages in their order, where it is kept, and what is told of stages left out.

    missing: of each teacher that nothing has trained, and nothing here trains.
    """

    folder: Path  # the run folder that the submission is kept in
    stages: list[Stage]
    notes: list[str]
    missing: tuple[str, ...] = ()


def plan(path: Path, overrides: list[str], sweeps: list[str], pipeline: bool, evaluate: list[str], world: int) -> Plan:
    """The stages of a configuration, without those whose result exists.

    sweeps: one training for each combination of their values. pipeline: first the teachers. Embeddings that are to be
    stored and are not there come before the training. evaluate: shards to evaluate each run on, at last. world: ranks
    of a training.
    Raises UserError for whatever `mmtard train` would refuse before it imports torch.
    """
    folder, students = _students(path, overrides, sweeps)
    stages, notes, missing = _teacher_stages(_teachers(path, overrides, students), pipeline, world)
    needed = tuple(work.run_dir for stage in stages for work in stage.works)

    to_train = [c for c in students if steps_done(Path(c.run_dir)) < c.train.steps]
    notes += [f"complete: {c.run_dir}" for c in students if c not in to_train]
    storing, more_notes = storing_works(to_train, needed)
    notes += more_notes
    if storing:
        stages.append(Stage("stored embeddings", tuple(storing), needed))
        needed += tuple(work.run_dir for work in storing)
    if to_train:
        stages.append(Stage("training", tuple(_training(c, world) for c in to_train), needed))
    evaluations, more_notes = _evaluation_stages(students, to_train, evaluate)
    stages += evaluations
    notes += more_notes
    return Plan(folder, stages, notes, tuple(missing))


def steps_done(run: Path) -> int:
    """The step of a run's newest whole checkpoint; 0 where there is none."""
    step = newest_state(run).get("step")
    return step if isinstance(step, int) else 0


def newest_state(run: Path) -> dict:
    """The state of a run's newest checkpoint that is whole by its files' sizes; {} where there is none."""
    checkpoint, _ = manifest.newest(run)
    try:
        state = json.loads((checkpoint / manifest.STATE).read_bytes()) if checkpoint else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return state if isinstance(state, dict) else {}


# ---------------------------------------------------------------- the parts


def _students(path: Path, overrides: list[str], sweeps: list[str]) -> tuple[Path, list[Config]]:
    """(the configuration's own run folder, one configuration for each point of the sweep, in run folders under it)."""
    try:
        folder = Path(settings.load(path, [*overrides, *(f"{k}={v[0]}" for k, v in map(_axis, sweeps))]).run_dir)
    except UserError as error:
        listed = next((o for o in overrides if len(_commas(o)) > 1 and o.partition("=")[0] in str(error)), None)
        raise UserError(f"{error} (for one run of each value: --sweep {listed})" if listed else str(error)) from None
    if not sweeps:
        return folder, [settings.load(path, overrides)]
    axes, students = [_axis(s) for s in sweeps], []
    for values in itertools.product(*(values for _, values in axes)):
        point = [f"{key}={value}" for (key, _), value in zip(axes, values)]
        config = settings.load(path, [*overrides, *point])
        if not any(key == "run_dir" for key, _ in axes):
            config = config.model_copy(update={"run_dir": str(folder / "_".join(map(slug, point)))})
        students.append(config)
    runs = [c.run_dir for c in students]
    for run in runs:
        if runs.count(run) > 1:
            raise UserError(f"--sweep: two runs would share the folder '{run}'; give each value once")
    _refuse_one_name([run.strip("/") for run in runs], "--sweep")
    return folder, students


def _refuse_one_name(texts: list[str], flag: str) -> None:
    """Raise UserError where two of the texts would make one file's name: one would take the other's place."""
    known: dict[str, str] = {}
    for text in texts:
        name = slug(text)
        if name in known:
            raise UserError(f"{flag}: '{known[name]}' and '{text}' would both be kept as '{name}'; name them otherwise")
        known[name] = text


def _axis(sweep: str) -> tuple[str, list[str]]:
    key, _, values = sweep.partition("=")
    listed = _commas(values)
    if not key or not all(v.strip() for v in listed):
        raise UserError(f"--sweep: '{sweep}' is not of the form key.sub=value,value")
    return ("seed" if key == "seeds" else key), listed


def _commas(text: str) -> list[str]:
    """Split at the commas that are not inside brackets or quotes."""
    parts, closing = [""], []
    for c in text:
        if closing and c == closing[-1]:
            closing.pop()
        elif c in "\"'[{" and not (closing and closing[-1] in "\"'"):
            closing.append({"[": "]", "{": "}"}.get(c, c))
        parts[-1] += c
        if c == "," and not closing:
            parts[-1] = parts[-1][:-1]
            parts.append("")
    return parts


def _teachers(path: Path, overrides: list[str], students: list[Config]) -> dict[str, Config]:
    """`teacher NAME` -> the configuration of teachers/ that trains it: the one whose run folder are its weights."""
    known = {}
    shared = [o for o in overrides if any(o.startswith((f"{key}=", f"{key}.")) for key in SHARED)]
    for file in sorted(
        file for folder in (path.parent, path.parent.parent) for file in (folder / "teachers").glob("*.yaml")
    ):
        try:
            config = settings.load(file, shared)
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
        known[Path(config.run_dir).absolute()] = config
    trainings: dict[str, Config] = {}
    for student in students:
        for name, teacher in student.teachers.items():
            config = known.get(Path(teacher.weights).absolute())
            if config is None or config in trainings.values():
                continue
            title = f"teacher {name}"
            if title in trainings:  # a sweep over teachers may call two of them the same
                title = f"{title} {slug(config.run_dir)}"
            trainings[title] = config
    return trainings


def _teacher_stages(
    teachers: dict[str, Config], pipeline: bool, world: int
) -> tuple[list[Stage], list[str], list[str]]:
    """(the trainings of the teachers that are not complete, in a pipeline; notes; what is said of those missing)."""
    stages, notes, missing = [], [], []
    for name, config in teachers.items():
        run = Path(config.run_dir)
        if steps_done(run) >= config.train.steps:
            notes += [f"{name} is complete: {run}"] if pipeline else []
        elif pipeline:
            _refuse_ranks(name, config, world)
            stages.append(Stage(name, (_training(config, world, f"{name}: "),)))
        elif not steps_done(run):
            missing.append(f"{name}: {run} holds no checkpoint yet; --pipeline trains it first")
    return stages, notes, missing


def _refuse_ranks(name: str, teacher: Config, world: int) -> None:
    """Raise UserError where no number of lanes shares a teacher's batch among the ranks: overrides do not reach it."""
    lanes, batch = teacher.data.lanes, teacher.train.batch_size
    if batch % world:
        limit = f"allows at most {batch} ranks, not {world}" if world > batch else f"cannot be shared by {world} ranks"
        raise UserError(
            f"{name}: its batch of {batch} {limit}; train this teacher without --pipeline on fewer GPUs "
            f"(a number that divides {lanes}), then submit the student"
        )


def _evaluation_stages(
    students: list[Config], to_train: list[Config], evaluate: list[str]
) -> tuple[list[Stage], list[str]]:
    """(the evaluations of each student on each of these shards, after its training; notes about those that exist)."""
    stages, notes = [], []
    _refuse_one_name([shards.strip("/") for shards in evaluate], "--evaluate")
    for config, shards in itertools.product(students, evaluate):
        run = Path(config.run_dir)
        out = run / layout.EVALUATIONS / slug(shards.strip("/"))
        if (out / layout.RESULTS).is_file() and config not in to_train:
            notes.append(f"evaluated: {out}")
            continue
        _shards_exist(shards, config.data.allow_pipe, "--evaluate: ")
        words = ("evaluate", str(run), "--data", shards, "--device", config.engine.device, "--out", str(out))
        words += ("--allow-pipe",) if config.data.allow_pipe else ()
        stages.append(Stage("evaluation", (Work(run, None, words),), (run,) if config in to_train else ()))
    return stages, notes


def storing_works(students: list[Config], teachers: tuple[Path, ...]) -> tuple[list[Work], list[str]]:
    """(one work for each set of embeddings that is not stored, notes about those that are).

    teachers: run folders that are still to be trained.
    """
    works: dict[str, Work] = {}
    notes: list[str] = []
    soon = {run.absolute() for run in teachers}
    for config in students:
        missing = []
        for name, folder in stored_teachers(config).items():
            if folder is None or Path(config.teachers[name].weights).absolute() in soon:
                missing.append(embedding_recipe(config, name))
            else:
                notes.append(f"embeddings of teacher {name} are stored: {folder}")
        if missing:  # the points of a sweep that agree in these share one store
            works.setdefault(json.dumps(missing), Work(Path(config.run_dir), config, ("cache",)))
    return list(works.values()), list(dict.fromkeys(notes))


def _training(config: Config, world: int, where: str = "") -> Work:
    try:
        settings.check_world(config, world)
    except UserError as error:
        raise UserError(f"{where}{error}") from None
    _shards_exist(config.data.shards, config.data.allow_pipe, where)
    return Work(Path(config.run_dir), config, ("train",))


def _shards_exist(shards: str | list[str], allow_pipe: bool, where: str) -> None:
    try:
        check_openers(expand_shards(shards), allow_pipe)
    except UserError as error:
        raise UserError(f"{where}{error}") from None
