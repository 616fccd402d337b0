"""How robust accuracies come out wrong: each is done here the wrong way, which must be seen to mislead, and ours."""

import copy
import time
import warnings

import pytest
import torch
import torch.nn.functional as F
from pyautoattack import AutoAttack
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted

from mmtard import losses
from mmtard.attacks import ensemble
from mmtard.attacks.apgd import apgd
from mmtard.attacks.state import AttackSettings
from mmtard.errors import UserError
from mmtard.seeding import derive_seeds

from .conftest import Double, convolutions

ITERS = 10


def run(victim, *names, model=None, images=None, rows=slice(None), **settings):
    settings = AttackSettings(**{"eps": victim.eps, "iters": ITERS, "queries": 50, **settings})
    images = victim.images if images is None else images
    return ensemble.run_attacks(
        model or victim.model, images[rows], victim.labels[rows], victim.seeds[rows], names, settings
    )


def test_restarts_are_said_and_seeds_are_not_the_clock(victim, monkeypatch):
    theirs = AutoAttack(victim.model, version="custom", attacks=["apgd-ce"], eps=victim.eps)
    assert theirs.apgd.n_restarts == 5  # FARE's code, and "standard", mean one
    first = theirs.get_seed()
    time.sleep(0.01)
    assert theirs.get_seed() != first
    once = run(victim, "apgd-ce")
    monkeypatch.setattr(time, "time", lambda: 1e9)
    torch.manual_seed(123)
    again = run(victim, "apgd-ce")
    stand, fallen = int(once.robust.sum()), int((~once.robust).sum())  # who falls is asked no more
    queries = once.facts.queries["apgd-ce"] - stand * (ITERS + 1)
    assert AttackSettings(eps=1.0).restarts == 1 and 0 < fallen <= queries < fallen * (ITERS + 1)
    assert again.adv.equal(once.adv) and again.broken_by == once.broken_by
    more = run(victim, "apgd-ce", restarts=4).facts.queries["apgd-ce"] - once.facts.queries["apgd-ce"]
    assert 0 < more <= 3 * stand * (ITERS + 1)  # of three more restarts, on survivors


@pytest.mark.parametrize("classes,skipped", [(2, {"apgd-t", "apgd-dlr"}), (3, {"apgd-t"}), (5, set())])
def test_few_classes(classes, skipped, victim):
    torch.manual_seed(1)
    model = Double(convolutions(8, 12, 2, out=classes).double().requires_grad_(False))
    labels = model(victim.images).argmax(1)
    with pytest.raises(IndexError):
        APGDAttack_targeted(model, n_iter=1, eps=1e-6, device="cpu").perturb(victim.images, labels)
    names = ["apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square"]
    settings = AttackSettings(eps=1e-6, iters=2, queries=3)
    out = ensemble.run_attacks(model, victim.images, labels, victim.seeds, names, settings)
    assert out.facts.skipped.keys() == skipped and out.facts.broken.keys() == set(names) - skipped
    assert all(f"there are {classes}" in reason for reason in out.facts.skipped.values())
    targets = classes - 1
    if "apgd-t" not in skipped:
        assert (
            out.facts.queries["apgd-t"] == 100 + targets * 100 * 3
        )  # the order, and each target's start and two steps
    assert out.facts.queries["fab-t"] == 100 + targets * 100 * 2 * 2
    assert (out.facts.zero_gradient_dlr is None) == (classes < 3)


def test_robust_accuracy_does_not_rise_with_the_batch_size(victim):
    def broken(loss, size):
        out = []
        for i in range(0, 96, size):
            x, y, seeds = (
                victim.images[i : i + size],
                victim.labels[i : i + size],
                derive_seeds(victim.seeds[i : i + size], 0),
            )
            out.append(
                victim.model(
                    apgd(lambda z: loss(z, y), x, norm="linf", eps=victim.eps, steps=ITERS, seeds=seeds)
                ).argmax(1)
                != y
            )
        return torch.cat(out)

    def mean_reduced(x, y):
        return F.cross_entropy(victim.model(x), y).expand(len(x))

    wrong = {size: int(broken(mean_reduced, size).sum()) for size in (1, 8, 64)}
    assert len(set(wrong.values())) > 1, wrong  # the step size follows what the batch gained
    ours = [
        torch.cat([run(victim, "apgd-ce", rows=slice(i, min(i + size, 96))).robust for i in range(0, 96, size)])
        for size in (1, 8, 64)
    ]
    assert ours[0].equal(ours[1]) and ours[0].equal(ours[2]) and 10 < ours[0].sum() < 90


def test_images_outside_the_range_are_refused(victim):
    mean, std = 0.5, 0.25
    normalised = (victim.images - mean) / std
    outside = lambda x: victim.model(x * std + mean)  # the model behind a loader that normalises
    wrong = APGDAttack(outside, n_iter=ITERS, eps=victim.eps, seed=0, device="cpu")
    wrong.init_hyperparam(normalised)
    adv = wrong.attack_single_run(normalised, victim.labels)[3]
    assert (outside(normalised).argmax(1) == victim.labels).all()
    assert ((outside(adv) - outside(normalised)).abs().amax(1) > 0).any() and adv.min() >= 0 > normalised.min()
    assert (adv - normalised).abs().max() > 10 * victim.eps, "the library's clamp to [0,1] does not show"
    with pytest.raises(UserError, match=r"not within \[0,1\]; pass plain pixels / 255"):
        run(victim, "apgd-ce", model=outside, images=normalised)
    with pytest.raises(UserError, match=r"values from 0 to 255"):
        run(victim, "apgd-ce", images=(victim.images.clamp(0, 1) > 0.5).float() * 255)
    with pytest.raises(UserError, match="torch.uint8 instead of float32"):
        run(victim, "apgd-ce", images=(victim.images * 255).to(torch.uint8))
    with pytest.raises(UserError, match=r"not within \[0,1\]"):
        run(victim, "apgd-ce", images=victim.images.clone().fill_(float("nan")))


def test_zero_gradients_are_counted(victim):
    saturated = lambda x: 1000 * victim.model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none comes
        adv = APGDAttack(saturated, n_iter=ITERS, eps=victim.eps, seed=0, loss="ce", device="cpu").perturb(
            victim.images, victim.labels
        )
    x = victim.images.clone().requires_grad_()
    gradient = torch.autograd.grad(F.cross_entropy(saturated(x), victim.labels, reduction="sum"), x)[0]
    zeros = int((gradient.flatten(1).norm(dim=1) == 0).sum())
    honest = run(victim, "apgd-ce").facts
    assert int((saturated(adv).argmax(1) == victim.labels).sum()) > 100 - honest.broken["apgd-ce"], "looks more robust"
    facts = run(victim, "apgd-ce", model=saturated).facts
    assert facts.zero_gradient_ce == zeros > 50 and facts.zero_gradient_dlr == 0
    assert honest.zero_gradient_ce == honest.zero_gradient_dlr == 0


def test_flags_are_those_of_the_attack_and_the_gap_is_counted(victim):
    rng = torch.Generator().manual_seed(0)

    def noisy(x):
        logits = victim.model(x)
        return logits + 0.3 * torch.randn(logits.shape, generator=rng)

    out = run(victim, "apgd-ce", model=noisy)
    broken = ~out.robust & out.clean
    assert (out.prediction != victim.labels)[broken].all() and sum(
        b == "apgd-ce" for b in out.broken_by
    ) == broken.sum()
    later = noisy(out.adv).argmax(1)
    wrong = int((later == victim.labels)[broken].sum())  # a pass over the saved images would call these robust
    assert wrong >= 2 and out.facts.taken_back >= 2
    assert run(victim, "apgd-ce").facts.taken_back == 0


def test_the_logits_attacked_are_those_that_the_model_gives(victim):
    """A student's scale moved: bare cosines, 100 cosines and its own scale are three attacks under cross-entropy."""
    cosines = lambda x: F.normalize(victim.model(x), dim=1)
    runs = {scale: run(victim, "apgd-ce", model=lambda x, s=scale: s * cosines(x)) for scale in (1.0, 14.0, 100.0)}
    broken = {scale: out.facts.broken["apgd-ce"] for scale, out in runs.items()}
    assert len(set(broken.values())) == 3, broken
    for scale, out in runs.items():
        adv = apgd(
            lambda x: losses.cross_entropy(scale * cosines(x), victim.labels),
            victim.images,
            norm="linf",
            eps=victim.eps,
            steps=ITERS,
            seeds=derive_seeds(victim.seeds, 0),
        )
        stands = out.robust  # of these the suite keeps the iterate of largest loss, as does the bare attack
        assert adv[stands].equal(out.adv[stands])
    scaled = [run(victim, "apgd-dlr", model=lambda x, s=scale: s * cosines(x)) for scale in (1.0, 64.0)]
    assert scaled[0].adv.equal(scaled[1].adv), "the difference of logits ratio knows no scale"


def test_bfloat16_would_round_the_perturbation_so_the_attack_is_float32(victim):
    step = torch.full_like(victim.images, 1 / 255)
    rounded = (victim.images + step).bfloat16().float() - victim.images
    assert (rounded - step).abs().mean() * 255 > 0.06  # of the perturbation's size
    plain = run(victim, "apgd-ce")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert copy.deepcopy(victim.net).float()(victim.images).dtype == torch.bfloat16
        under = run(victim, "apgd-ce")
    assert under.adv.equal(plain.adv) and under.adv.dtype == torch.float32
    with pytest.raises(UserError, match="logits are torch.bfloat16; attacks need float32"):
        run(victim, "apgd-ce", model=lambda x: victim.model(x).bfloat16())
    with pytest.raises(UserError, match="torch.bfloat16 instead of float32"):
        run(victim, "apgd-ce", images=victim.images.bfloat16())
