"""A sample that has fallen is asked no more, at once, and no outcome changes by it."""

import pytest
import torch

from mmtard.attacks import ensemble
from mmtard.attacks.pursuit import Tries
from mmtard.attacks.state import AttackSettings, AttackState

GRADIENT = ["pgd", "apgd-ce", "apgd-dlr", "apgd-t", "fab-t"]
MEANS = {"iters": 8, "targets": 3, "restarts": 2, "queries": 60}


def attack(victim, name, rows=slice(None), room=1, eps=None):
    """(outcome, sizes of the batches that the model was given)."""
    sizes = []

    def model(images):
        sizes.append(len(images))
        return victim.model(images)

    batch = victim.images[rows], victim.labels[rows], victim.seeds[rows]
    settings = AttackSettings(eps=eps or victim.eps, **MEANS)
    return ensemble.run_attacks(model, *batch, [name], settings, None, room), sizes


@pytest.fixture
def all_are_asked(monkeypatch):
    """Call: fallen samples, too, are asked until the attack ends."""

    def patch():
        for kind in (AttackState, Tries):
            monkeypatch.setattr(kind, "pursued", lambda self, rows: torch.ones_like(rows, dtype=torch.bool))

    return patch


@pytest.mark.parametrize("name", GRADIENT)
def test_the_same_samples_fall_as_if_all_were_asked_to_the_end(name, victim, all_are_asked):
    out, _ = attack(victim, name)
    all_are_asked()
    asked, _ = attack(victim, name)
    assert 10 < out.facts.broken[name] < 90
    assert out.broken_by == asked.broken_by
    stand = out.robust
    assert out.adv[stand].equal(asked.adv[stand]) and out.prediction[stand].equal(asked.prediction[stand])
    assert out.facts.queries[name] < 0.9 * asked.facts.queries[name]


@pytest.mark.parametrize("name", [*GRADIENT, "square"])
def test_a_batch_asks_what_its_samples_would_ask_alone(name, victim):
    """What a sample costs ends with its fall, whoever stands beside it."""
    rows = range(0, 100, 12)
    together, _ = attack(victim, name, list(rows))
    alone = [attack(victim, name, [i])[0].facts.queries[name] for i in rows]
    assert together.facts.queries[name] == sum(alone) and len(set(alone)) > 1


@pytest.mark.parametrize("name", ["apgd-t", "fab-t"])
def test_starts_at_several_targets_share_a_batch_and_end_as_one_after_the_other(name, victim):
    rows = slice(0, 30)
    one_by_one, few = attack(victim, name, rows, room=1)
    together, many = attack(victim, name, rows, room=120)
    assert 5 < together.facts.broken[name] < 30
    assert len(many) < 0.6 * len(few) and max(many) <= 120
    for of in ("adv", "prediction", "clean"):
        assert getattr(together, of).equal(getattr(one_by_one, of)), of
    assert together.broken_by == one_by_one.broken_by
    assert together.facts.not_finite == one_by_one.facts.not_finite == 0
