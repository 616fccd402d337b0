"""A process that trains and measures runs of a study, one after another, as its parent asks it to.

A line of JSON comes in for each work, and goes out when it is done: to import torch once saves seconds a run.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import traceback
from pathlib import Path

from ..config import Config
from ..distributed.interruption import EXIT_REQUEUE, Interruption
from ..distributed.launcher import choose_accelerator
from ..distributed.processes import die_with_parent, exit_process
from ..errors import RunError, UserError
from ..files import slug, why_not_written, write_text
from ..runs.layout import CHECKPOINTS
from . import loading
from .measures import Measurement, of_model, of_run, start_configuration
from .runs import all_runs, configuration, model_configuration, model_folder
from .schema import Study

STORE, TRAIN, MEASURE, OF_MODEL = "store", "train", "measure", "model"
STORED = "stored"  # folder of a study: how long it took to store the teachers' embeddings that a run reads


def main(argv: list[str]) -> int:
    """argv: the parent's process id, the study's file, and the descriptor that answers go to."""
    parent, file, answers = int(argv[0]), Path(argv[1]), os.fdopen(int(argv[2]), "w", buffering=1)
    die_with_parent(parent)
    with Interruption() as interruption:
        study = loading.load(file)
        for line in sys.stdin:
            asked = json.loads(line)
            _print_into(Path(asked["log"]))
            if "WORLD_SIZE" in os.environ:
                os.environ["MMTARD_INIT_FILE"] = asked["meet"]
            status, message = carry_out(study, asked, interruption)
            sys.stdout.flush()
            answers.write(json.dumps({"status": status, "message": message}) + "\n")
            if status == EXIT_REQUEUE:
                break
    return 0


def _print_into(log: Path) -> None:
    """Let what this process prints go to the end of a file, or nowhere where the disk takes none."""
    try:
        opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
    except OSError:
        opened = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(opened, stream)
    os.close(opened)


def carry_out(study: Study, asked: dict, interruption: Interruption) -> tuple[int, str]:
    """Do a work; (exit status, why it is not 0)."""
    try:
        if asked["work"] == TRAIN:
            return train(study, asked, interruption), "stopped"
        if asked["work"] == STORE:
            store(study, asked, interruption)
            return 0, ""
        measure(measurements(study, asked), interruption, start_configuration(study).engine.device)
        return 0, ""
    except UserError as error:
        return 2, str(error)
    except RunError as error:
        return error.status, str(error)
    except Exception as error:  # the study goes on to say which run it was, and where its log is
        traceback.print_exc()
        return 1, f"{type(error).__name__}: {error}"


def train(study: Study, asked: dict, interruption: Interruption) -> int:
    """Train, or go on training; the exit status."""
    from ..training.train import train as train_run

    config = _configuration(study, asked)
    _refuse_damaged_models(study, config)
    choose_accelerator(config.engine.device)
    return train_run(config, interruption)


def store(study: Study, asked: dict, interruption: Interruption) -> None:
    """Store the embeddings of the teachers that a run reads, and note how long that took; what is stored stays."""
    from ..embeddings.build import cache

    began, config = time.monotonic(), _configuration(study, asked)
    _refuse_damaged_models(study, config)
    cache(config, interruption)
    note = stored_note(study, asked["name"])
    seconds = max(stored_seconds(study, asked["name"]), time.monotonic() - began)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        write_text(note, json.dumps({"seconds": seconds}) + "\n")
    except OSError as error:
        raise UserError(why_not_written(note, error)) from None


def stored_note(study: Study, name: str) -> Path:
    """The file that says how long the storing took that a run waited for."""
    return Path(study.out) / STORED / f"{slug(name)}.json"


def stored_seconds(study: Study, name: str) -> float:
    """How long a run waited for what it reads to be stored, or to be found stored; 0 where it reads none."""
    try:
        seconds = float(json.loads(stored_note(study, name).read_text())["seconds"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return 0.0
    return seconds if 0 <= seconds < math.inf else 0.0


def _configuration(study: Study, asked: dict) -> Config:
    name = asked["name"]
    return model_configuration(study, name) if asked.get(OF_MODEL) else configuration(study, all_runs(study)[name])


def measurements(study: Study, asked: dict) -> list[Measurement]:
    """What a work asks to be measured, done or not."""
    if asked.get(OF_MODEL):
        return of_model(study, asked["name"])
    return of_run(study, all_runs(study)[asked["name"]], asked["tuning"], asked["chosen"])


def measure(todo: list[Measurement], interruption: Interruption, device: str) -> None:
    """Measure what is not measured yet. Collective over the ranks of this launch.

    Raises UserError for a checkpoint that is damaged.
    """
    from ..distributed.ranks import process_group
    from ..evaluation.evaluate import evaluate

    with process_group(device) as ranks:
        for one in todo:
            if not ranks.run_on_first(lambda one=one: one.done):
                ranks.run_on_first(lambda one=one: refuse_damaged(Path(one.weights.weights)))
                evaluate(one.request(), ranks, interruption=interruption)
            interruption.stop(ranks, "what is measured is kept")


def refuse_damaged(checkpoint: Path) -> None:
    """Raise UserError, with what mends it, where a checkpoint of a run is there and not as it was written."""
    from ..runs.checkpoints import published, why_invalid

    reason = why_invalid(checkpoint) if checkpoint.parent.name == CHECKPOINTS and checkpoint.is_dir() else None
    if reason is None:
        return
    remedy = "remove that folder, and the study trains it again from the checkpoint before"
    if checkpoint != published(checkpoint.parent)[max(published(checkpoint.parent))]:
        # Nothing trains to a step on the way but the whole run, whose measurements then go with it.
        remedy = f"remove '{checkpoint.parent.parent}', and the study trains and measures this run anew"
    raise UserError(f"'{checkpoint}' is damaged ({reason}); {remedy}")


def _refuse_damaged_models(study: Study, config: Config) -> None:
    """Raise UserError where a model of the study that a training reads is damaged: its newest whole one is another."""
    read = {Path(model.weights).resolve() for model in (config.student, *config.teachers.values())}
    for name in study.models:
        folder = model_folder(study, name)
        if folder.resolve() in read:
            steps = model_configuration(study, name).train.steps
            refuse_damaged(folder / CHECKPOINTS / f"step-{steps}")


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
