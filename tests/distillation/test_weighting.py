import math
from types import SimpleNamespace

import pytest
import torch

from mmtard import config
from mmtard.distillation import weighting
from mmtard.distillation.weighting import balanced_next, balanced_start, teacher_weights
from mmtard.errors import UserError
from mmtard.zero_shot import Prediction

LABELS = torch.tensor([0, 2])
COS_R = torch.tensor([[0.25, 0.1, 0.0], [0.3, 0.2, -0.125]])
COS_C = torch.tensor([[-0.5, 0.1, 0.2], [0.1, 0.3, 0.75]])
P_R = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.5, 0.3]])
P_C = torch.tensor([[0.4, 0.3, 0.3], [0.1, 0.1, 0.8]])
P_3 = torch.tensor([[0.2, 0.7, 0.1], [0.05, 0.35, 0.6]])
TWO, THREE = {"robust": "adv", "clean": "clean"}, {"robust": "adv", "clean": "clean", "third": "adv"}


def weights(name, views=TWO, labels=LABELS, state=None, **settings):
    """Of teachers with the cosines and probabilities above: name -> list of weights."""
    given = {"robust_weight": 50.0, "clean_weight": 5.0, "slope": 4.0, "bias": 0.0, "budget": 1.0, **settings}
    logits = {"robust": P_R.log(), "clean": P_C.log(), "third": P_3.log()}
    cosines = {"robust": COS_R, "clean": COS_C, "third": COS_R + 0.125}
    teachers = {
        m: Prediction(None, cosines[m].clone().requires_grad_(), logits[m].clone().requires_grad_()) for m in views
    }
    found = teacher_weights(SimpleNamespace(weighting=name, views=views, **given), teachers, labels, state)
    assert found.keys() == views.keys() and not any(w.requires_grad for w in found.values())
    return {m: w.tolist() for m, w in found.items()}


def test_official_is_the_factor_times_the_cosine_to_the_true_class_also_when_negative():
    assert weights("official") == {"robust": [12.5, -6.25], "clean": [-2.5, 3.75]}


def test_official_with_more_teachers_takes_the_factor_of_the_image_each_sees():
    assert weights("official", THREE) == {"robust": [12.5, -6.25], "clean": [-2.5, 3.75], "third": [18.75, 0.0]}


def test_confidence_sigmoid_splits_the_budget_by_the_difference_of_true_class_probabilities():
    found = weights("confidence_sigmoid", slope=4.0, bias=0.5, budget=2.0)
    expected = [2 / (1 + math.exp(-2.5)), 2 / (1 + math.exp(1.5))]  # 4 * (0.9 - 0.4) + 0.5 and 4 * (0.3 - 0.8) + 0.5
    assert found["robust"] == pytest.approx(expected, rel=1e-6)
    assert [r + c for r, c in zip(found["robust"], found["clean"])] == pytest.approx([2.0, 2.0], rel=1e-6)


def test_confidence_sigmoid_of_three_is_the_softmax_of_their_confidences():
    found = weights("confidence_sigmoid", THREE, slope=2.0, bias=0.25)
    e = [math.exp(2 * p + b) for p, b in ((0.9, 0.25), (0.4, 0), (0.2, 0.25))]
    assert [found[m][0] for m in THREE] == pytest.approx([x / sum(e) for x in e], rel=1e-6)


def test_entropy_prefers_the_teacher_that_is_surer_of_whatever_class():
    def certainty(p):
        return 1 + sum(q * math.log(q) for q in p) / math.log(3)

    robust, clean = certainty([0.2, 0.5, 0.3]), certainty([0.1, 0.1, 0.8])
    found = weights("entropy", slope=3.0, bias=0.5)
    assert found["robust"][1] == pytest.approx(1 / (1 + math.exp(-(3 * (robust - clean) + 0.5))), rel=1e-5)
    assert found["robust"][1] + found["clean"][1] == pytest.approx(1, rel=1e-6)


def test_hardness_gives_more_to_a_sample_the_robust_teachers_doubt():
    assert weights("hardness", slope=2.0, budget=3.0)["clean"] == pytest.approx(
        [1.5 * 1.2, 1.5 * 2.4], rel=1e-6
    )  # 1 - .9 and 1 - .3
    three = weights("hardness", THREE, slope=2.0, budget=3.0)
    assert (
        three["third"] == three["clean"] == pytest.approx([1 + 2 * 0.45, 1 + 2 * 0.55], rel=1e-6)
    )  # means .55 and .45


def test_constant_is_the_factor_alone():
    assert weights("constant", THREE) == {"robust": [50.0, 50.0], "clean": [5.0, 5.0], "third": [50.0, 50.0]}


def test_uniform_shares_the_budget():
    assert weights("uniform", THREE, budget=1.5) == dict.fromkeys(THREE, [0.5, 0.5])


def test_mtard_weighs_as_its_state_says():
    assert weights("mtard", budget=2.0, state={"w_robust": 0.75, "w_clean": 0.25}) == {
        "robust": [1.5, 1.5],
        "clean": [0.5, 0.5],
    }


def test_balanced_losses_by_hand():
    """The teacher whose loss has fallen less since the first step gains weight, at the rate."""
    state = balanced_start(TWO)
    assert state == {"w_robust": 0.5, "w_clean": 0.5}
    state = balanced_next(0.1, state, {"robust": 4.0, "clean": 2.0})
    assert state == pytest.approx({"w_robust": 0.5, "w_clean": 0.5, "first_robust": 4.0, "first_clean": 2.0})
    state = balanced_next(0.1, state, {"robust": 3.0, "clean": 0.5})  # relative .75 and .25
    assert state == pytest.approx(
        {"w_robust": 0.1 * 0.75 + 0.9 * 0.5, "w_clean": 0.1 * 0.25 + 0.9 * 0.5, "first_robust": 4.0, "first_clean": 2.0}
    )
    state = balanced_next(0.1, state, {"robust": 1.0, "clean": 1.5})  # relative .25 and .75
    assert (state["w_robust"], state["w_clean"]) == pytest.approx((0.1 * 0.25 + 0.9 * 0.525, 0.1 * 0.75 + 0.9 * 0.475))


def test_balanced_losses_survive_a_teacher_that_begins_at_zero():
    state = balanced_next(0.5, balanced_start(TWO), {"robust": 2.0, "clean": 0.0})
    assert state == {"w_robust": 0.75, "w_clean": 0.25, "first_robust": 2.0, "first_clean": 0.0}
    assert balanced_next(0.5, state, {"robust": 0.0, "clean": 0.0}) == state


@pytest.mark.parametrize("name", config.WEIGHTINGS)
def test_a_weighting_reads_labels_if_the_schema_says_so(name):
    state = {"w_robust": 0.6, "w_clean": 0.4}
    found = [weights(name, labels=labels, state=state) for labels in (LABELS, torch.tensor([1, 0]))]
    assert (found[0] != found[1]) is config.WEIGHTINGS[name]


def test_the_weightings_are_those_of_the_schema_and_an_unknown_one_is_answered_with_them():
    assert weighting.FUNCTIONS.keys() == config.WEIGHTINGS.keys(), "a weighting stands in both"
    assert all(function.__name__ == name for name, function in weighting.FUNCTIONS.items())
    with pytest.raises(
        UserError,
        match="unknown weighting 'entrpy'; known: confidence_sigmoid, constant,"
        " entropy, hardness, mtard, official, uniform",
    ):
        teacher_weights(SimpleNamespace(weighting="entrpy"), {}, LABELS, {})
