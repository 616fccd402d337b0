"""The health section passes honest models, and catches those that hide their gradient, their batch or a failure."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from mmtard.attacks import checks, ensemble
from mmtard.attacks.batching import AdaptiveBatchSize
from mmtard.attacks.state import AttackSettings

from .conftest import convolutions


def examine(model, victim, labels=None, source=None, **changes):
    """Names of the lines by status, and all lines by name, of an evaluation with --sanity."""
    labels = victim.labels if labels is None else labels
    settings = AttackSettings(**{"eps": victim.eps, "iters": 10, "queries": 100, **changes})
    out = ensemble.run_attacks(model, victim.images, labels, victim.seeds, ["apgd-ce", "apgd-dlr", "square"], settings)
    lines = checks.check([(settings, out.facts)]) + checks.sanity(
        model, victim.images, labels, victim.seeds, settings, source
    )
    names = [line["check"] for line in lines]
    assert len(set(names)) == len(names)
    return {
        status: {line["check"] for line in lines if line["status"] == status} for status in ("PASS", "WARN", "FAIL")
    }, {line["check"]: line["detail"] for line in lines}


@pytest.fixture(scope="module")
def honest(victim):
    out = ensemble.run_attacks(
        victim.model,
        victim.images,
        victim.labels,
        victim.seeds,
        ["apgd-ce", "square"],
        AttackSettings(eps=victim.eps, iters=10, queries=100),
    )
    return out.facts


def test_an_honest_model_passes_every_check(victim):
    status, detail = examine(victim.model, victim, source=lambda x: victim.model(x.flip(3)))
    assert not status["WARN"] and not status["FAIL"], detail
    assert status["PASS"] == {
        "largest perturbation",
        "range",
        "NaN",
        "zero gradient of cross-entropy",
        "zero gradient of DLR",
        "later forward pass",
        "square not stronger than white-box",
        "monotone in steps",
        "monotone in eps, half to double",
        "near zero at 64/255",
        "random noise weaker than the attack",
        "square weaker than the attack",
        "transfer weaker than the attack",
        "batch size",
    }


def test_a_quantised_input_is_caught(victim):
    """Rounding has no gradient: every white-box attack stays at its start, and all that is left is to guess."""
    quantised = lambda x: victim.model((x * 32).round() / 32)
    assert (
        ensemble.run_attacks(
            quantised, victim.images, victim.labels, victim.seeds, ["apgd-ce"], AttackSettings(eps=victim.eps, iters=10)
        ).robust.sum()
        > 80
    )  # looks robust
    status, detail = examine(quantised, victim)
    assert {
        "zero gradient of cross-entropy",
        "zero gradient of DLR",
        "square not stronger than white-box",
        "square weaker than the attack",
        "near zero at 64/255",
    } <= status["WARN"]
    assert not status["FAIL"]


def test_saturated_logits_are_caught(victim):
    status, detail = examine(lambda x: 1000 * victim.model(x), victim)
    assert "zero gradient of cross-entropy" in status["WARN"] and "zero gradient of DLR" in status["PASS"], detail


def test_hidden_dependence_on_the_batch_is_caught(victim):
    torch.manual_seed(0)
    layers = convolutions(16, 12, 2).double()
    net = (
        nn.Sequential(*layers[:-1], nn.BatchNorm1d(16 * 9, dtype=torch.float64), layers[-1])
        .requires_grad_(False)
        .train()
    )
    model = lambda x: net(x.double()).float()
    labels = model(victim.images).argmax(1)
    status, detail = examine(model, victim, labels)
    assert "batch size" in status["WARN"] and "fails on batches of 1" in detail["batch size"]

    spatial = (
        nn.Sequential(layers[0], nn.BatchNorm2d(16, dtype=torch.float64), *layers[1:]).requires_grad_(False).train()
    )
    model = lambda x: spatial(x.double()).float()
    labels = model(victim.images).argmax(1)
    status, detail = examine(model, victim, labels)
    assert "batch size" in status["WARN"] and "logits differ by" in detail["batch size"]
    spatial.eval()
    labels = model(victim.images).argmax(1)
    assert "batch size" in examine(model, victim, labels)[0]["PASS"]


def test_a_scrambled_model_that_no_gradient_leads_anywhere_is_caught(victim):
    """A gradient of the wrong sign: the steps lead away, noise does better and large balls stay full."""

    class Backwards(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return -g

    status, detail = examine(lambda x: victim.model(Backwards.apply(x)), victim, source=victim.model)
    assert {
        "near zero at 64/255",
        "square weaker than the attack",
        "transfer weaker than the attack",
        "square not stronger than white-box",
    } <= status["WARN"], detail


def test_hard_failures(victim, honest):
    settings = AttackSettings(eps=victim.eps)
    cases = {
        "largest perturbation": {"largest_perturbation": victim.eps * 1.001},
        "range": {"lowest_pixel": -1e-3},
        "NaN": {"not_finite": 1},
    }
    assert not checks.failed(checks.check([(settings, honest)]))
    for name, change in {
        **cases,
        "range ": {"highest_pixel": 1.001},
        "largest perturbation ": {"largest_perturbation": float("nan")},
    }.items():
        lines = checks.check([(settings, replace(honest, **change))])
        assert [line["check"] for line in lines if line["status"] == "FAIL"] == [name.strip()] and checks.failed(lines)


def test_nan_in_the_model_is_a_failure_and_no_success_of_the_attack(victim):
    """A model that gives NaN away from the clean images: argmax of NaN is no class."""
    clean = victim.images.clone()

    def broken(x):
        logits = victim.model(x)
        return torch.where(
            (x - clean[: len(x)]).abs().amax((1, 2, 3), keepdim=True).flatten(1) > 0, logits * float("nan"), logits
        )

    out = ensemble.run_attacks(
        broken, victim.images, victim.labels, victim.seeds, ["apgd-ce"], AttackSettings(eps=victim.eps, iters=3)
    )
    assert out.facts.broken == {"apgd-ce": 0} and out.facts.not_finite == 100
    assert checks.failed(checks.check([(AttackSettings(eps=victim.eps), out.facts)]))


def test_an_attack_that_leaves_its_ball_is_a_failure(victim, monkeypatch):
    """Projection forgotten: the steps add up."""
    from mmtard.attacks import pgd

    monkeypatch.setattr(pgd, "into_ball", lambda adv, images, norm, eps: adv)
    out = ensemble.run_attacks(
        victim.model, victim.images, victim.labels, victim.seeds, ["pgd"], AttackSettings(eps=victim.eps, iters=10)
    )
    failures = {
        line["check"]
        for line in checks.check([(AttackSettings(eps=victim.eps), out.facts)])
        if line["status"] == "FAIL"
    }
    assert failures == {"largest perturbation", "range"}


def test_warnings_from_what_the_attacks_did(honest):
    def warned(*runs):
        lines = checks.check(list(runs))
        assert not checks.failed(lines)
        return {line["check"]: line["detail"] for line in lines if line["status"] == "WARN"}

    small, large = AttackSettings(eps=1 / 255), AttackSettings(eps=2 / 255)
    honest = replace(
        honest, n=1000, attacked=800, largest_perturbation=1 / 255, broken={"apgd-ce": 300, "square": 2}, taken_back=0
    )
    assert warned((small, honest)) == {}
    assert list(warned((small, replace(honest, broken={"apgd-ce": 300, "square": 3})))) == [
        "square not stronger than white-box"
    ]
    assert warned((small, replace(honest, broken={"square": 300}))) == {}, "alone it has nothing to be measured against"
    assert list(warned((small, replace(honest, broken={"apgd-t": 300, "transfer": 9})))) == [
        "transfer not stronger than white-box"
    ]
    assert list(warned((small, replace(honest, taken_back=3)))) == ["later forward pass"]
    assert list(warned((small, replace(honest, zero_gradient_ce=1)))) == ["zero gradient of cross-entropy"]
    left_out = warned(
        (
            small,
            replace(
                honest, zero_gradient_dlr=None, skipped={"apgd-t": "the targeted DLR loss needs 4 classes, there are 2"}
            ),
        )
    )
    assert (
        list(left_out) == ["every attack ran"]
        and "apgd-t left out: the targeted DLR loss needs 4 classes" in left_out["every attack ran"]
    )
    weaker = replace(honest, broken={"apgd-ce": 297, "square": 2})
    assert list(warned((large, weaker), (small, honest))) == ["monotone in eps"]
    assert warned((small, weaker), (large, honest)) == {}


def test_nothing_to_attack_is_said(victim):
    labels = (victim.model(victim.images).argmax(1) + 1) % 10
    lines = checks.sanity(victim.model, victim.images, labels, victim.seeds, AttackSettings(eps=victim.eps))
    assert lines == [
        {"check": "sanity", "status": "WARN", "detail": "no sample is classified correctly: nothing to attack"}
    ]


def test_a_smaller_limit_changes_no_line_and_memory_that_is_too_small_halves_it(victim):
    """Models whose forward of more than 10 samples does not fit."""
    settings = AttackSettings(eps=victim.eps, iters=5)

    def small(x):
        if len(x) > 10:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return victim.model(x)

    batch = (victim.images[:40], victim.labels[:40], victim.seeds[:40])
    halving = AdaptiveBatchSize(64, lambda _: None)
    whole, halved = (
        checks.sanity(victim.model, *batch, settings),
        checks.sanity(small, *batch, settings, halving=halving),
    )
    assert (
        halving.limit == 8
        and whole[:-1] == halved[:-1]
        and "at 1, " in halved[-1]["detail"]
        and "at 64" not in halved[-1]["detail"]
    )


def test_sanity_in_l2(victim):
    lines = checks.sanity(
        victim.model, victim.images, victim.labels, victim.seeds, AttackSettings(eps=0.8, norm="l2", iters=10)
    )
    assert {line["status"] for line in lines} == {"PASS"} and "square weaker than the attack" not in {
        line["check"] for line in lines
    }


def test_a_clean_image_without_finite_logits_is_wrong_never_attacked_and_a_failure(victim):
    """NaN once counted as class 0: clean accuracy was 100 % where the label was 0, and every check passed."""
    labels = torch.zeros_like(victim.labels)

    def model(x):
        return victim.model(x) * float("nan")

    out = ensemble.run_attacks(
        model, victim.images, labels, victim.seeds, ["pgd", "square"], AttackSettings(eps=victim.eps, iters=2)
    )
    assert not out.clean.any() and not out.robust.any() and (out.clean_prediction == -1).all()
    assert out.broken_by == [None] * 100 and out.facts.attacked == 0 and out.facts.not_finite == 100
    assert checks.failed(checks.check([(AttackSettings(eps=victim.eps), out.facts)]))
    assert checks.sanity(model, victim.images, labels, victim.seeds, AttackSettings(eps=victim.eps))[0]["detail"] == (
        "no sample is classified correctly: nothing to attack"
    )


def test_logits_that_are_not_finite_are_a_failing_line_of_the_clean_pass():
    assert checks.finite_logits(0, 50) == {
        "check": "finite logits", "status": "PASS", "detail": "0 of 50 clean images with NaN or infinite logits",
    }  # fmt: skip
    line = checks.finite_logits(3, 50)
    assert line["status"] == "FAIL" and checks.failed([line])
    assert line["detail"] == "3 of 50 clean images with NaN or infinite logits; they count as wrong"


def test_a_large_ball_is_not_doubled_beyond_the_range_of_a_pixel(victim):
    rows = slice(16)
    lines = checks.sanity(
        victim.model, victim.images[rows], victim.labels[rows], victim.seeds[rows], AttackSettings(eps=0.75, iters=2)
    )
    doubled = next(line for line in lines if line["check"] == "monotone in eps, half to double")
    assert "at 0.375, " in doubled["detail"] and doubled["detail"].endswith("at 1")
