import math
from types import SimpleNamespace

import pytest
import torch

from mmtard.errors import UserError
from mmtard.methods import Prediction
from mmtard.weighting import confidence_sigmoid, official, teacher_weights

LABELS = torch.tensor([0, 2])
COS_R = torch.tensor([[0.25, 0.1, 0.0], [0.3, 0.2, -0.125]])
COS_C = torch.tensor([[-0.5, 0.1, 0.2], [0.1, 0.3, 0.75]])


def test_official_is_the_factor_times_the_cosine_to_the_true_class_also_when_negative():
    w_robust, w_clean = official(COS_R, COS_C, LABELS, robust_weight=50.0, clean_weight=5.0)
    assert w_robust.tolist() == [12.5, -6.25]
    assert w_clean.tolist() == [-2.5, 3.75]


def test_confidence_sigmoid_splits_the_budget_by_the_difference_of_true_class_probabilities():
    p_robust = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.5, 0.3]])
    p_clean = torch.tensor([[0.4, 0.3, 0.3], [0.1, 0.1, 0.8]])
    w_robust, w_clean = confidence_sigmoid(p_robust, p_clean, LABELS, slope=4.0, bias=0.5, budget=2.0)
    expected = [2 / (1 + math.exp(-2.5)), 2 / (1 + math.exp(1.5))]  # 4 * (0.9 - 0.4) + 0.5 and 4 * (0.3 - 0.8) + 0.5
    assert w_robust.tolist() == pytest.approx(expected, rel=1e-6)
    assert (w_robust + w_clean).tolist() == pytest.approx([2.0, 2.0], rel=1e-6)


@pytest.mark.parametrize("weighting", ["official", "confidence_sigmoid"])
def test_teacher_weights_carry_no_gradient(weighting):
    settings = SimpleNamespace(weighting=weighting, robust_weight=50.0, clean_weight=5.0, slope=4.0, bias=0.0, budget=1.0)
    teachers = [Prediction(c, c, 100 * c) for c in (COS_R.clone().requires_grad_(), COS_C.clone().requires_grad_())]
    weights = teacher_weights(settings, *teachers, LABELS)
    assert not any(w.requires_grad for w in weights)
    assert weights[0].shape == weights[1].shape == (2,)


def test_confidence_sigmoid_of_predictions_reads_the_softmax_of_the_logits():
    settings = SimpleNamespace(weighting="confidence_sigmoid", slope=4.0, bias=0.0, budget=1.0)
    logits_r, logits_c = torch.tensor([[0.6, 0.4]]).log(), torch.tensor([[0.1, 0.9]]).log()
    w_robust, _ = teacher_weights(settings, Prediction(None, None, logits_r), Prediction(None, None, logits_c), torch.tensor([0]))
    assert w_robust.item() == pytest.approx(1 / (1 + math.exp(-2.0)), rel=1e-6)  # 4 * (0.6 - 0.1)


def test_an_unknown_weighting_is_answered_with_the_known_ones():
    with pytest.raises(UserError, match="unknown weighting 'entropy'; known: confidence_sigmoid, official"):
        teacher_weights(SimpleNamespace(weighting="entropy"), None, None, LABELS)
