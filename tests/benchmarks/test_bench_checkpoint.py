"""`mmtard bench checkpoint` and `bench scale --weak`: what they measure is what the training does."""

import json

import pytest

from mmtard.benchmarks.checkpoint import CheckpointBenchmark
from mmtard.benchmarks.weak_scaling import report_weak_scaling
from mmtard.config import validate
from mmtard.models.loading import load_skeleton


@pytest.fixture
def config(tree, vit):
    tree["student"] = {"arch": vit, "weights": "random"}
    tree["teachers"], tree["method"] = {}, {"name": "clean"}
    tree["engine"] = {"device": "cpu", "precision": "float32", "zero_stage": 2}
    return validate(tree)


def test_a_checkpoint_is_three_float32_numbers_a_weight_and_leaves_nothing_behind(config, tmp_path, capsys):
    CheckpointBenchmark(config, rounds=2, folder=tmp_path).run(tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    weights = sum(p.numel() for p in load_skeleton(config.student, "student").tower().parameters())
    assert found["bytes"] == pytest.approx(12 * weights, rel=0.01)
    assert found["seconds"].keys() == {"copy", "hand over", "write", "longest pause"}
    assert all(len(values) == 2 and min(values) >= 0 for values in found["seconds"].values())
    assert found["seconds"]["hand over"][0] < found["seconds"]["write"][0]
    assert not list(tmp_path.glob("mmtard-bench-*")) and "the loop stands still" in capsys.readouterr().out


def test_weak_scaling_holds_more_ranks_to_the_first(config, tmp_path, capsys):
    def of(*seconds):
        return {"variants": {"mmtard": {"seconds": list(seconds), "communication": [s / 10 for s in seconds]}}}

    report_weak_scaling(config, {1: of(1.0, 2.0, 3.0), 2: of(2.5)}, tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())["seconds"] == {"1": [1.0, 2.0, 3.0], "2": [2.5]}
    assert json.loads((tmp_path / "out.json").read_text())["communication"]["2"] == [0.25]
    printed = capsys.readouterr().out
    assert "80 %" in printed and "6.4" in printed  # 2.0 s for 2.5; 2 ranks of 8 images in 2.5 s
