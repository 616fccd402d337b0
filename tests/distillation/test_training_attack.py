"""The attack of each update: factor, ramp, matched steps, the fall back after an alarm, N-FGSM."""

from fractions import Fraction

import pytest
import torch

from mmtard.config.attack import Attack, Ramp
from mmtard.distillation.training_attack import nfgsm, perturb
from mmtard.errors import UserError
from mmtard.seeding import sample_uniform

SEEDS = torch.arange(5)
IMAGES = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def strength(attack):
    return attack.eps * 255, attack.step_size * 255, attack.steps


def test_an_attack_that_nothing_changes_is_the_section_itself():
    attack = Attack()
    assert all(attack.at(update) is attack for update in (0, 7)) and attack.at(3, fell_back=True) is attack


def test_the_factor_is_of_eps_and_step_and_the_table_keeps_its_own():
    attack = Attack(eps="4/255", step_size="2/255", eps_factor="1.4")
    assert strength(attack.at(0)) == (Fraction(28, 5), Fraction(14, 5), 10)
    assert attack.eps == Fraction(4, 255)
    assert attack.at(0).at(1) == attack.at(1), "what is resolved is not scaled again"


@pytest.mark.parametrize("steps,step", [(1, Fraction(5)), (2, Fraction(5)), (3, Fraction(10, 3)), (10, Fraction(1))])
def test_a_matched_step_crosses_the_ball(steps, step):
    assert strength(Attack(eps="4/255", step_size=None, steps=steps).at(9)) == (4, step, steps)


def test_a_ramp_begins_weak_and_is_exact_at_every_update():
    attack = Attack(eps="4/255", step_size="2/255", steps=5, ramp=Ramp(until=8, eps="1/4", steps=1))
    seen = [strength(attack.at(t)) for t in range(10)]
    # eps: a quarter and an eighth of the other three quarters an update; steps: four stages of two updates each.
    assert [e for e, _, _ in seen] == [
        4 * (Fraction(1, 4) + Fraction(3, 4) * min(Fraction(t + 1, 8), 1)) for t in range(10)
    ]
    assert [s for _, s, _ in seen] == [e / 2 for e, _, _ in seen]
    assert [n for _, _, n in seen] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert attack.at(8) == attack.at(100) == attack


def test_a_ramp_from_nothing_attacks_from_the_first_update_on():
    first = Attack(ramp=Ramp(until=4, eps=0)).at(0)
    assert strength(first) == (Fraction(1, 2), Fraction(1, 4), 10)
    assert perturb(first, lambda x: x.flatten(1).sum(1), IMAGES, SEEDS).sub(IMAGES).abs().max() > 0


def test_after_the_alarm_an_attack_of_fewer_steps_has_more():
    one = Attack(eps="4/255", step_size="5/255", steps=1, algorithm="nfgsm")
    assert strength(one.at(5, fell_back=True)) == (4, Fraction(10, 3), 3) and one.at(5, True).algorithm == "pgd"
    assert one.at(5).algorithm == "nfgsm"
    assert strength(Attack(steps=1, alarm_steps=None, step_size=None).at(5, True))[2] == 1
    ramped = Attack(steps=6, step_size="1/255", ramp=Ramp(until=6, steps=1))
    assert [ramped.at(t, True).steps for t in range(7)] == [3, 3, 3, 3, 4, 5, 6]


def test_nfgsm_steps_from_noise_and_is_not_brought_back_to_the_ball():
    """Against the paper's formula in float64, sample by sample."""
    weights = torch.linspace(-1, 1, 48).reshape(3, 4, 4)
    eps, noise = 8 / 255, 2.0
    found = nfgsm(lambda x: (x * weights).flatten(1).sum(1).sin(), IMAGES, SEEDS, eps, noise)
    for i in range(len(IMAGES)):
        n = noise * eps * (2 * sample_uniform(SEEDS[i : i + 1], (3, 4, 4))[0].double() - 1)
        x = (IMAGES[i].double() + n).clamp(0, 1)
        gradient = (x * weights.double()).sum().cos() * weights.double()
        expected = (x + eps * gradient.sign()).clamp(0, 1)
        assert torch.allclose(found[i].double(), expected, atol=1e-6)
    assert (found - IMAGES).abs().max() > 2 * eps, "beyond eps"
    attack = Attack(algorithm="nfgsm", eps="8/255", steps=1)
    assert perturb(attack.at(0), lambda x: (x * weights).flatten(1).sum(1).sin(), IMAGES, SEEDS).equal(found)


@pytest.mark.parametrize(
    "settings,words",
    [
        ({"algorithm": "nfgsm"}, "takes one step, not 10; set attack.steps=1, or take pgd"),
        ({"algorithm": "nfgsm", "steps": 1, "norm": "l2"}, "set attack.norm=linf"),
        ({"algorithm": "nfgsm", "steps": 1, "restarts": 2}, "set attack.restarts=1"),
        ({"algorithm": "nfgsm", "steps": 1, "random_start": False}, "set attack.random_start=true"),
        ({"ramp": {"until": 5}}, "attack.ramp: it begins at full strength; set attack.ramp.eps or attack.ramp.steps"),
        ({"ramp": {"until": 5, "steps": 11}}, "attack.ramp.steps: 11 is more than attack.steps 10"),
        ({"eps": "4/255", "eps_factor": 64}, "attack.eps_factor: 64 times attack.eps is the whole range of a pixel"),
    ],
)
def test_what_means_nothing_is_refused(settings, words):
    from mmtard.config import validate

    tree = {
        "run_dir": "r",
        "student": {"weights": "random"},
        "method": {"name": "tecoa"},
        "attack": settings,
        "data": {"shards": "s", "lanes": 2},
        "train": {"steps": 1, "batch_size": 2},
    }
    with pytest.raises(UserError) as error:
        validate(tree)
    assert words in str(error.value) and str(error.value).startswith("attack.")
