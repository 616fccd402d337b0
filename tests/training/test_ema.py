"""The moving average in the place of the weights; tests/parallel/test_students.py holds how it is made."""

import pytest
import torch

from mmtard.config import Model
from mmtard.errors import UserError
from mmtard.evaluation import model
from mmtard.export.folder import export
from mmtard.models import clip, loading
from mmtard.runs import checkpoints
from mmtard.runs.checkpoint_writer import Checkpoints


@pytest.fixture
def run(resnet, tmp_path):
    """A run with an average: start and weights and average of three seeds, and batch-norm statistics in the weights."""
    folder = tmp_path / "run"
    loading.load_clip(Model(arch=resnet, weights="random"), seed=1).save(folder / clip.START_FOLDER)
    weights, average = (loading.load_clip(Model(arch=resnet, weights="random"), seed=seed).tower() for seed in (2, 3))
    state = {k: v + 0.5 if k.endswith("running_mean") else v for k, v in weights.state_dict().items()}
    saver = Checkpoints(folder, keep_last=1)
    saver.save(1, state, {f"ema.{k}": v.detach() for k, v in average.named_parameters()}, {"step": 1})
    saver.wait()
    return folder, state, dict(average.named_parameters())


def test_the_average_is_loaded_and_exported_in_the_weights_place(run, tmp_path):
    folder, state, average = run
    loaded = loading.load_clip(Model(weights=str(folder), ema=True)).tower().state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(v, average[k] if k in average else state[k]) for k, v in loaded.items())
    export(Model(weights=str(folder), ema=True), tmp_path / "out")
    exported = torch.load(tmp_path / "out" / "image_tower.pt", weights_only=True)
    assert all(torch.equal(v, loaded[f"visual.{k}"]) for k, v in exported.items())


def test_an_evaluations_results_say_that_it_was_the_average(run, ranks):
    weights, average = (
        model.load_model(Model(weights=str(run[0]), ema=ema), ranks).description for ema in (False, True)
    )
    assert (weights["weights"], weights["ema"], average["weights"], average["ema"]) == (
        str(run[0]),
        False,
        str(run[0]),
        True,
    )
    assert weights["sha256"] != average["sha256"] and weights["text_sha256"] == average["text_sha256"]


def test_an_average_that_nobody_kept_is_refused(run, tmp_path):
    folder, state, _ = run
    kept = Checkpoints(folder, keep_last=2)
    kept.save(2, state, {}, {})
    kept.wait()
    with pytest.raises(UserError, match=r"step-2' holds no moving average of the weights: its run had no train.ema"):
        loading.load_clip(Model(weights=str(folder), ema=True))
    with pytest.raises(UserError, match="model.ema: 'openai' is no run or checkpoint"):
        loading.load_clip(Model(arch="ViT-B-32", weights="openai", ema=True), where="model")
    assert checkpoints.read_weights(folder / "checkpoints/step-2").keys() == state.keys()
