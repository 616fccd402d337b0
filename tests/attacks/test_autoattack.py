"""The original AutoAttack as one more attack by name: the same model, ball and samples; torch's state is left alone."""

import sys

import pytest
import torch
import torch.nn.functional as F

from mmtard.attacks import autoattack, ensemble, registry
from mmtard.attacks.state import AttackSettings
from mmtard.errors import UserError

MEANS = {"iters": 10, "queries": 100, "targets": 3}
OURS = ["apgd-ce", "apgd-t", "fab-t", "square"]


def attack(victim, names, rows=slice(None), **settings):
    settings = AttackSettings(**{"eps": victim.eps, **MEANS, **settings})
    images, labels, seeds = victim.images[rows], victim.labels[rows], victim.seeds[rows]
    return ensemble.run_attacks(victim.model, images, labels, seeds, names, settings)


def test_the_original_breaks_the_samples_that_our_four_attacks_break(victim):
    theirs, ours = attack(victim, ["autoattack"]), attack(victim, OURS)
    assert 20 < theirs.facts.broken["autoattack"] < 90, "eps is badly chosen: nothing to compare"
    assert (theirs.robust == ours.robust).sum() >= 96


def test_aa_is_its_short_name(victim):
    out = attack(victim, ["aa"], rows=slice(20))
    assert set(out.broken_by) <= {None, "autoattack"} and list(out.facts.broken) == ["autoattack"]
    assert ensemble.defined_attacks(["aa", "apgd-ce"], 10) == (["autoattack", "apgd-ce"], {})


def test_its_means_are_the_settings(victim):
    few, many = (attack(victim, ["aa"], slice(20), eps=1e-5, iters=k, queries=q) for k, q in ((2, 10), (4, 10)))
    more = attack(victim, ["aa"], slice(20), eps=1e-5, iters=2, queries=50)
    base = few.facts.queries["autoattack"]
    assert few.robust.all() and many.facts.queries["autoattack"] > base
    assert more.facts.queries["autoattack"] - base == 20 * 40


def test_its_samples_are_broken_inside_an_l2_ball_too(victim):
    images = F.interpolate(victim.images[:30], 16, mode="bilinear")
    model = lambda x: victim.model(F.adaptive_avg_pool2d(x, 12))
    labels, settings = model(images).argmax(1), AttackSettings(eps=0.8, norm="L2", iters=5, queries=20, targets=1)
    out = ensemble.run_attacks(model, images, labels, victim.seeds[:30], ["autoattack"], settings)
    assert 0 < out.facts.broken["autoattack"] < 30
    assert out.facts.largest_perturbation <= 0.8 * (1 + 1e-5)
    with pytest.raises(UserError, match="does not run in L2 on images of 12x12"):
        attack(victim, ["autoattack"], slice(4), norm="L2")


def test_torchs_generator_and_the_trace_function_are_left_as_they_were(victim):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    trace = sys.gettrace()

    def watch(frame, event, argument):
        return None

    sys.settrace(watch)
    try:
        first = attack(victim, ["aa"], slice(10))
        assert sys.gettrace() is watch
    finally:
        sys.settrace(trace)
    assert torch.rand(3).equal(expected)
    assert attack(victim, ["aa"], slice(10)).adv.equal(first.adv)


def test_without_the_library_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(autoattack.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install pyautoattack, or take mmtard's own apgd-ce apgd-t fab-t square"):
        registry.find_attack("aa")
    assert registry.find_attack("apgd-ce")
