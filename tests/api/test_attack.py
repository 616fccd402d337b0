"""`mmtard.attack`: plain tensors and any `images -> logits`, whole results, and every wrong use named."""

import fractions

import numpy as np
import pytest
import torch

import mmtard
from mmtard.attacks.apgd import apgd
from mmtard.attacks.attack import attack_tensors
from mmtard.attacks.state import AttackSettings
from mmtard.errors import UserError
from mmtard.seeding import derive_seeds, sample_seeds

from .conftest import NAMES


@pytest.fixture
def result(classifier, images, labels):
    return mmtard.attack(classifier, images, labels, eps="8/255", iters=5)


def test_what_fell_is_misclassified_inside_the_ball(result, classifier, images, labels):
    assert not result.correct[0] and result.correct[1:].all() and not result.fell[0] and not result.robust[0]
    assert 0 < result.fell.sum() and result.robust.equal(result.correct & ~result.fell)
    assert (result.images - images).abs().max() <= 8 / 255 + 1e-6 and result.images[0].equal(images[0])
    with torch.no_grad():
        now = classifier(result.images).argmax(1)
    assert now.equal(result.prediction) and (now != labels).equal(result.fell | ~result.correct)
    assert [name == "apgd-ce" for name in result.broken_by] == result.fell.tolist()
    assert result.clean_accuracy == pytest.approx(11 / 12)
    assert result.robust_accuracy == pytest.approx(float(result.robust.float().mean()))


def test_it_is_the_attack_of_an_evaluation(result, classifier, images, labels):
    """The bare APGD with the seeds of an evaluation's samples 0, 1, ... gives the images of what stands."""
    seeds = torch.from_numpy(sample_seeds(0, 0, np.arange(12)).view(np.int64))
    adv = apgd(
        lambda x: mmtard.losses.cross_entropy(classifier(x), labels[1:]),
        images[1:],
        norm="linf",
        eps=8 / 255,
        steps=5,
        seeds=derive_seeds(seeds[1:], 0),
    )
    stands = result.robust[1:]
    assert torch.allclose(adv[stands], result.images[1:][stands], atol=1e-6)


def test_health_lines_tell_whether_it_can_be_believed(result):
    assert {line["check"] for line in result.health} >= {"largest perturbation", "range", "NaN", "later forward pass"}
    assert result.healthy and str(result).startswith("12 images: clean 91.7%, under attack ")
    assert f"PASS {len(result.health)} of {len(result.health)} health checks" in str(result)


def test_a_model_that_gives_nan_fails_by_name_and_counts_as_wrong(classifier, images, labels):
    def broken(x):
        return torch.where(torch.arange(len(x))[:, None] < 3, torch.nan, classifier(x))

    result = mmtard.attack(broken, images, labels, eps="8/255", iters=2)
    assert result.clean_prediction[:3].tolist() == [-1] * 3 and not result.correct[:3].any()
    assert [line["check"] for line in result.health if line["status"] == "FAIL"] == ["NaN"] and not result.healthy
    assert "FAIL NaN: eps 0.03137: " in str(result)


@pytest.mark.parametrize("norm,ours", [("Linf", "linf"), (np.inf, "linf"), ("L2", "l2"), (2, "l2")])
def test_norms_and_sizes_are_taken_as_libraries_write_them(norm, ours, classifier, images, labels):
    sizes = ("1/2", 0.5, fractions.Fraction(1, 2))
    results = [mmtard.attack(classifier, images, labels, eps, norm, iters=2) for eps in sizes]
    expected = mmtard.attack(classifier, images, labels, 0.5, ours, iters=2)
    assert all(result.images.equal(expected.images) for result in results)


@pytest.mark.parametrize("name", ["pgd", "apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square", "autoattack"])
def test_each_attack_by_name(name, classifier, images, labels):
    result = mmtard.attack(classifier, images, labels, eps="16/255", name=name, iters=3, queries=20, targets=2)
    assert set(result.broken_by) <= {None, name} and result.facts.queries[name] > 0
    assert (result.images - images).abs().max() <= 16 / 255 + 1e-6


def test_several_attacks_run_one_after_the_other(classifier, images, labels):
    names = ["apgd-ce", "square"]
    result = mmtard.attack(classifier, images, labels, eps="8/255", name=names, iters=3, queries=20)
    assert list(result.facts.broken) == names
    source = mmtard.attack(classifier, images, labels, name="transfer", iters=2, source=lambda x: classifier(x.flip(3)))
    assert source.facts.queries["transfer"] > 0


def test_the_batch_size_changes_no_result_but_the_seed_does(result, classifier, images, labels):
    halves = mmtard.attack(classifier, images, labels, eps="8/255", iters=5, batch_size=5)
    assert halves.broken_by == result.broken_by and torch.allclose(halves.images, result.images, atol=1e-5)
    other = mmtard.attack(classifier, images, labels, eps="8/255", iters=5, seed=1)
    assert not other.images.equal(result.images)


def test_tensors_of_inference_mode_and_gradients_of_the_caller_are_no_obstacle(result, classifier, images, labels):
    with torch.inference_mode():
        inside = mmtard.attack(classifier, images.clone(), labels.clone(), eps="8/255", iters=5)
    assert inside.images.equal(result.images) and not result.images.requires_grad
    assert mmtard.attack(classifier, images.requires_grad_(), labels, iters=1).facts.n == 12 and images.grad is None


def test_an_open_clip_model_is_attacked_by_its_wrapper(open_clip_model, images):
    classifier = mmtard.load(open_clip_model).classifier(NAMES)
    with torch.no_grad():
        labels = classifier(images).argmax(1)
    assert mmtard.attack(classifier, images, labels, eps="8/255", iters=3).clean_accuracy == 1.0
    with pytest.raises(UserError, match=r"it returns a tuple of \d .* an open_clip model with mmtard.load\(model\)"):
        mmtard.attack(open_clip_model, images, labels)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"eps": 8}, r"eps: 8 lets an attack replace the whole image, .* write 8/255"),
        ({"eps": 0}, "eps: 0.0 is no attack"),
        ({"eps": "-2/255"}, "eps: -"),
        ({"eps": "two"}, "eps: 'two' is not a fraction; write it as 2/255 or 0.0078"),
        ({"eps": "2/0"}, "eps: '2/0' is not a fraction"),
        ({"eps": None}, "eps: None is not a number"),
        ({"eps": float("nan")}, "eps: 'nan' is not a fraction"),
        ({"eps": 100, "norm": "L2"}, "eps: 100 in L2 turns any image of 3x16x16 pixels grey"),
        ({"norm": "foo"}, "norm: 'foo' is not known"),
        ({"norm": 1}, "norm: 1 is not known"),
        ({"name": "apgd"}, "unknown attack 'apgd'; known: apgd-ce"),
        ({"name": []}, "name: no attack"),
        ({"name": "transfer"}, "source: 'transfer' follows the gradients of another model; give it"),
        ({"name": "square", "norm": "L2"}, "'square' is written for linf"),
        ({"iters": 0}, "iters: 0 is too few"),
        ({"batch_size": 0}, "batch_size: 0 is too few"),
        ({"step_size": "0"}, "step_size: 0.0 is not positive"),
    ],
    ids=str,
)
def test_wrong_settings_are_answered_in_one_line(change, message, classifier, images, labels):
    with pytest.raises(UserError, match=message) as caught:
        mmtard.attack(classifier, images, labels, **change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda m, x, y: (m, (x * 255).byte(), y), "images: torch.uint8 instead of float32"),
        (lambda m, x, y: (m, x * 255, y), r"images: values from .*, not within \[0,1\]"),
        (
            lambda m, x, y: (m, (x - 0.48) / 0.27, y),
            r"not within \[0,1\]; pass plain pixels / 255 and normalise inside",
        ),
        (lambda m, x, y: (m, x[0], y), r"images: shape \[3, 16, 16\]; give a batch"),
        (lambda m, x, y: (m, x * torch.nan, y), "images: NaN among the pixels"),
        (lambda m, x, y: (m, x.numpy(), y), "images: a ndarray, not a tensor"),
        (lambda m, x, y: (m, x, y[:5]), r"labels: shape \[5\] beside 12 images"),
        (lambda m, x, y: (m, x, y.float()), "labels: torch.float32 instead of int64"),
        (lambda m, x, y: (m, x, y.to("meta")), "labels: on meta, the images on cpu"),
        (lambda m, x, y: (m, x, y + 5), "is beyond the model's 5 classes"),
        (lambda m, x, y: (m, x, y - 6), "is no class"),
        (lambda m, x, y: (lambda z: (m(z), 1), x, y), "it returns a tuple of 2 instead of logits"),
        (lambda m, x, y: (lambda z: m(z).sum(), x, y), r"its logits have shape \[\] for 12 images"),
        (lambda m, x, y: (lambda z: m(z).bfloat16(), x, y), "its logits are torch.bfloat16"),
        (lambda m, x, y: (lambda z: m(z.detach()), x, y), "have no gradient to the images"),
        (lambda m, x, y: (m.train(), x, y), r"it is in training mode, .* call model.eval\(\) first"),
        (lambda m, x, y: (torch.nn.Linear(2, 2, device="meta").eval(), x, y), "images: on cpu, the model on meta"),
        (lambda m, x, y: (None, x, y), "model: a NoneType cannot be called"),
    ],
)
def test_wrong_tensors_and_models_are_answered_where_they_come_in(change, message, classifier, images, labels):
    with pytest.raises(UserError, match=message):
        mmtard.attack(*change(classifier, images, labels), iters=2)


def test_a_model_without_class_names_is_told_how_to_get_them(model, images, labels):
    with pytest.raises(UserError, match=r"name the classes: model.classifier\(\['cat', 'dog'\]\)"):
        mmtard.attack(model, images, labels)


def test_attacks_that_need_more_classes_are_named(images):
    model = lambda x: x.flatten(1)[:, :2]
    labels = model(images).argmax(1)
    with pytest.raises(UserError, match="no attack is left .apgd-t: the targeted DLR loss needs 4 classes"):
        mmtard.attack(model, images, labels, name="apgd-t")
    both = attack_tensors(model, images, labels, AttackSettings(eps=0.01, iters=1), ["apgd-t", "pgd"])
    assert any("apgd-t left out" in line["detail"] for line in both.health)


def test_an_attack_that_found_nothing_to_attack_is_not_healthy(classifier, images, labels):
    """Labels in another order: nothing was tried, which must not pass for a check of the attack."""
    wrong = (labels + 1) % len(NAMES)
    wrong[0] = (wrong[0] + 1) % len(NAMES)
    result = mmtard.attack(classifier, images, wrong, iters=2)
    assert result.clean_accuracy == 0 and not result.healthy
    assert "WARN something to attack: the model is right on none of 12 images" in str(result)
    assert "something to attack" not in [
        line["check"] for line in mmtard.attack(classifier, images, labels, iters=2).health
    ]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seed": "a"}, "seed: 'a' is not a whole number"),
        ({"seed": None}, "seed: None is not a whole number"),
    ],
)
def test_what_an_attack_needs_is_asked_for_before_any_image_is_seen(classifier, images, labels, change, message):
    with pytest.raises(UserError, match=message):
        mmtard.attack(classifier, images, (labels + 1) % len(NAMES), **change)
