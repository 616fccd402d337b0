"""A process that trains and measures runs of a study, one after another, as its parent asks it to.

A line of JSON comes in for each work, and goes out when it is done: to import torch once saves seconds a run.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

from ..distributed.interruption import EXIT_REQUEUE, Interruption
from ..distributed.processes import die_with_parent, exit_process
from ..errors import RunError, UserError
from . import loading
from .measures import Measurement, of_model, of_run, start_configuration
from .runs import all_runs, configuration, model_configuration
from .schema import Study

TRAIN, MEASURE, OF_MODEL = "train", "measure", "model"


def main(argv: list[str]) -> int:
    """argv: the parent's process id, the study's file, and the descriptor that answers go to."""
    parent, file, answers = int(argv[0]), Path(argv[1]), os.fdopen(int(argv[2]), "w", buffering=1)
    die_with_parent(parent)
    with Interruption() as interruption:
        study = loading.load(file)
        for line in sys.stdin:
            asked = json.loads(line)
            with open(asked["log"], "a") as log:
                for stream in (1, 2):
                    os.dup2(log.fileno(), stream)
            if "WORLD_SIZE" in os.environ:
                os.environ["MMTARD_INIT_FILE"] = asked["meet"]
            status, message = carry_out(study, asked, interruption)
            sys.stdout.flush()
            answers.write(json.dumps({"status": status, "message": message}) + "\n")
            if status == EXIT_REQUEUE:
                break
    return 0


def carry_out(study: Study, asked: dict, interruption: Interruption) -> tuple[int, str]:
    """Do a work; (exit status, why it is not 0)."""
    try:
        if asked["work"] == TRAIN:
            return train(study, asked, interruption), "stopped"
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

    name = asked["name"]
    config = model_configuration(study, name) if asked.get(OF_MODEL) else configuration(study, all_runs(study)[name])
    if config.engine.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return train_run(config, interruption)


def measurements(study: Study, asked: dict) -> list[Measurement]:
    """What a work asks to be measured, done or not."""
    if asked.get(OF_MODEL):
        return of_model(study, asked["name"])
    return of_run(study, all_runs(study)[asked["name"]], asked["tuning"], asked["chosen"])


def measure(todo: list[Measurement], interruption: Interruption, device: str) -> None:
    """Measure what is not measured yet. Collective over the ranks of this launch."""
    from ..distributed.ranks import process_group
    from ..evaluation.evaluate import evaluate

    with process_group(device) as ranks:
        for one in todo:
            if not ranks.run_on_first(lambda one=one: one.done):
                evaluate(one.request(), ranks, interruption=interruption)
            interruption.stop(ranks, "what is measured is kept")


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
