import math

import pytest
import torch

from mmtard.distillation.accuracy import accuracies, batch_hits
from mmtard.distillation.methods import Pass
from mmtard.zero_shot import Prediction

LOGITS = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [float("nan"), 0.0, 1.0], [0.0, 3.0, 1.0]])


def prediction(logits):
    return Prediction(None, logits / 100, logits)


def test_hits_are_of_the_students_passes_and_of_labelled_samples():
    predictions = {
        Pass("student", "adv"): prediction(LOGITS),
        Pass("student", "clean"): prediction(LOGITS.flip(0)),
        Pass("robust", "clean"): prediction(LOGITS),
    }
    found = {name: hit.tolist() for name, hit in batch_hits(predictions, torch.tensor([0, 1, -1, 1])).items()}
    # The third sample has no label, and its prediction, which is none, is no hit.
    assert found == {"acc_adv": [1, 0, 0, 1], "acc_clean": [0, 0, 0, 0], "labelled": [1, 1, 0, 1]}
    assert batch_hits({Pass("student", "adv"): prediction(torch.empty(4, 0))}, torch.zeros(4, dtype=torch.int64)) == {}


def test_a_mean_is_over_the_labelled_samples():
    means = accuracies({"loss": 2.0, "acc_adv": 0.25, "labelled": 0.5})
    assert means == {"loss": 2.0, "acc_adv": 0.5}
    assert math.isnan(accuracies({"acc_adv": 0.0, "labelled": 0.0})["acc_adv"])
    assert accuracies({"loss": 1.0}) == pytest.approx({"loss": 1.0})
