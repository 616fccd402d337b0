"""What the cost model says of ZeRO's traffic, held to the collectives that DeepSpeed calls on two ranks."""

import json
from pathlib import Path

import pytest
from parallel.launch import run_ranks

from mmtard.benchmarks.scale import Work, travelling_weights

CASES = ["0-True", "1-True", "2-True", "3-True", "3-False"]
TWICE = {"all_reduce": 2}  # a ring's: a reduce-scatter and an all-gather


@pytest.mark.slow
def test_the_volumes_of_each_stage_are_those_that_deepspeed_sends(tmp_path):
    run_ranks([Path(__file__).with_name("step_volumes.py"), tmp_path / "out.json", *CASES], 2, tmp_path, "ranks")
    for case, sent in json.loads((tmp_path / "out.json").read_text()).items():
        stage, copy = case.split("-")
        work = Work(
            images=8, flops={}, attack_steps=3, teacher_forwards=2, trained=10**6, zero_stage=int(stage), gathered=0,
            attack_copy=copy == "True",
        )  # fmt: skip
        moved = sum(TWICE.get(name, 1) * numbers for name, numbers in sent.items())
        assert travelling_weights(work) / 1e6 == pytest.approx(moved, rel=0.03), (case, sent)
