"""Steps whose loss or gradient is not finite are skipped, counted and named; too many in a row end the run."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mmtard.errors import RunError

from .launch import start_ranks

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("nan_at_step.py")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


STAGES = (0, 2, 3)  # 1 shares the code of 2


@pytest.fixture(scope="module")
def ended(job, tmp_path_factory):
    """What two ranks leave that train, one after another, a run of each ZeRO stage with a NaN in it, and one that
    diverges: (runs, log).
    """
    jobs, tecoa = {}, {"method": {"name": "tecoa"}, "teachers": {}}
    for stage in STAGES:
        engine = {"precision": "float32", "device": "cpu", "zero_stage": stage}
        train = {"steps": 4, "batch_size": 16, "lr": 1e-3}
        jobs[stage] = job(f"nan{stage}", **tecoa, engine=engine, train=train, checkpoint={"every": 1, "keep_last": 9})
    jobs["diverged"] = job("diverged", train={"steps": 24, "batch_size": 16, "lr": 1e30, "max_bad_steps": 3})
    folder = tmp_path_factory.mktemp("non-finite")
    processes = start_ranks([SCRIPT, 3, *(path for path, _ in jobs.values())], 2, folder / "meet", folder / "log")
    assert [p.wait(240) for p in processes] == [1, 1]
    return {name: run for name, (_, run) in jobs.items()}, (folder / "log.0").read_text()


@pytest.mark.parametrize("stage", STAGES)
def test_a_nan_on_one_rank_skips_the_step_on_all_and_names_rank_and_sample(ended, stage):
    run = ended[0][stage]
    weights = {n: load_file(run / f"checkpoints/step-{n}/weights.safetensors") for n in (1, 2, 3, 4)}
    states = {n: json.loads((run / f"checkpoints/step-{n}/state.json").read_text()) for n in weights}

    def same(a, b):
        return all((weights[a][k] == weights[b][k]).all() for k in weights[a])

    assert same(2, 3) and not same(1, 2) and not same(3, 4)
    assert [states[n]["updates"] for n in weights] == [1, 2, 2, 3]
    assert [row["skipped"] for row in lines(run / "metrics.jsonl")] == [0, 0, 1, 1]
    assert lines(run / "metrics.jsonl")[2]["loss"] is None
    (event,) = lines(run / "events.jsonl")
    assert (event["step"], event["event"], event["ranks"]) == (3, "non-finite loss, step skipped", [1])
    (sample,) = event["samples"]
    assert sample.split("/")[0] in ("0.tar", "1.tar", "2.tar")


def test_a_run_of_non_finite_steps_ends_with_the_reason(ended):
    runs, printed = ended
    assert "3 steps in a row were not finite" in printed and "Traceback" not in printed
    rows = lines(runs["diverged"] / "metrics.jsonl")
    assert rows[-1]["skipped"] == 3 and len(rows) < 24


def test_weights_that_give_no_finite_loss_are_neither_saved_nor_called_complete(job, train_here):
    """They are finite themselves: 1e30."""
    path, run = job("ruined", train={"steps": 3, "batch_size": 16, "lr": 1e30, "max_bad_steps": 9, "warmup_steps": 0})
    with pytest.raises(
        RunError, match="step 3: no sample of the batch has a finite loss, so the weights are not saved"
    ):
        train_here(path)
    assert not list((run / "checkpoints").glob("step-*"))
    assert lines(run / "resume.jsonl")[-1]["end"]["kind"] == "failed"
