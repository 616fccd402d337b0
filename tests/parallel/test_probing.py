"""A probed run: its probes are right, it trains as if there were none, and no kill leaves a process behind."""

import json
import signal
from dataclasses import replace

import pytest
from processes import processes_where

from mmtard.config import Data, Model, parse_fraction
from mmtard.evaluation.datasets import find_datasets
from mmtard.evaluation.evaluate import evaluate
from mmtard.evaluation.protocols import PROTOCOLS
from mmtard.evaluation.request import EvaluationRequest
from mmtard.evaluation.statistics import wilson_interval

from .launch import run_ranks, start_ranks
from .test_interruptions import digest, metrics, train, until

pytestmark = pytest.mark.slow


def background(run):
    """Process ids of the run's probes, whoever their parent is by now."""
    return processes_where(
        lambda words: "mmtard.training.probe_process" in words and any(w.startswith(str(run)) for w in words)
    )


def test_a_killed_run_takes_its_probe_along_and_goes_on_as_an_unprobed_one(job, undisturbed, tmp_path, ranks):
    shards = job("unused")[0].with_name("shards")
    settings = {"data": str(shards), "every": 12, "n_samples": 45, "steps": 3, "threads": 1}
    config, run = job("probed", probe=settings)
    processes = start_ranks(train(config), 2, tmp_path / "meet", tmp_path / "log")
    assert until(lambda: run.exists() and background(run), processes)
    for p in processes:
        p.send_signal(signal.SIGKILL)
    for p in processes:
        p.wait()
    assert until(lambda: not background(run), [], 10)

    printed = run_ranks(train(config), 2, tmp_path, "last")
    assert not background(run)
    assert metrics(run) == metrics(undisturbed) and digest(run) == digest(undisturbed)

    probes = {row["step"]: row for row in map(json.loads, (run / "probes.jsonl").read_text().splitlines())}
    assert probes.keys() == {12, 24}, "the lost probe was made up for, the last waited for"
    assert f"probe of step 24: clean {100 * probes[24]['clean']:.1f} %" in printed
    best = max(probes.values(), key=lambda row: (row["robust"], row["clean"], row["step"]))
    link = run / "checkpoints" / "most_robust"
    assert link.resolve().name == f"step-{best['step']}"
    for folder, row in ((link, best), (undisturbed / "checkpoints" / "latest", probes[24])):
        accuracies = alone(folder, shards, ranks, tmp_path / folder.name)
        assert accuracies == [(row["clean"], 45), (row["robust"], row["n"])]
        assert wilson_interval(round(45 * row["robust"]), 45) == pytest.approx(row["interval95"])


def alone(folder, shards, ranks, out):
    """(accuracy, samples) of `mmtard evaluate` with the probe's settings, clean and robust."""
    protocol = replace(
        PROTOCOLS["quick"],
        eps=(parse_fraction("8/255"),),
        attacks=("pgd",),
        iters=3,
        n_samples=45,
        templates=tuple(Data(shards=str(shards)).templates),
    )
    found = evaluate(
        EvaluationRequest(Model(weights=str(folder)), find_datasets(str(shards)), protocol, out, workers=0),
        ranks,
        say=lambda _: None,
    )["datasets"][0]
    return [(a["accuracy"], a["n"]) for a in (found["clean"], found["eps"]["8/255"]["robust"])]
