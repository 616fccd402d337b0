"""An attack that is stopped at any question to the model goes on in another process, and ends as if nothing was."""

import pytest
from safetensors.torch import load, save

from mmtard.attacks import ensemble
from mmtard.attacks.memory import AttackMemory
from mmtard.attacks.state import AttackSettings

MEANS = {"iters": 6, "targets": 3, "restarts": 2, "queries": 30}


class Stopped(Exception):
    pass


def attack(victim, name, room, memory=None, until=None):
    """The outcome; Stopped at the question number `until`."""
    asked = iter(range(10**6))

    def model(images):
        if next(asked) == until:
            raise Stopped
        return victim.model(images)

    settings = AttackSettings(eps=victim.eps, **MEANS)
    batch = victim.images[:20], victim.labels[:20], victim.seeds[:20]
    outcome = ensemble.run_attacks(model, *batch, [name], settings, None, room, memory)
    return outcome, next(asked)


def on_disk(tensors):
    return load(save({name: tensor.clone() for name, tensor in tensors.items()}))


@pytest.mark.parametrize(
    "name, room",
    [("pgd", 1), ("apgd-ce", 1), ("apgd-t", 1), ("apgd-t", 64), ("fab-t", 1), ("fab-t", 64), ("square", 1)],
)
def test_a_stopped_attack_goes_on_where_it_was(name, room, victim):
    undisturbed, questions = attack(victim, name, room)
    assert 3 < undisturbed.facts.broken[name] < 20
    for until in (2, questions // 3, questions - 6):
        stopped = AttackMemory()
        with pytest.raises(Stopped):
            attack(victim, name, room, stopped, until)
        outcome, more = attack(victim, name, room, AttackMemory(on_disk(stopped.snapshot())))
        assert outcome.adv.equal(undisturbed.adv) and outcome.prediction.equal(undisturbed.prediction)
        assert outcome.broken_by == undisturbed.broken_by
        # FAB asks twice an iteration: it repeats the first question where it was stopped at the second.
        assert 0 <= outcome.facts.queries[name] - undisturbed.facts.queries[name] <= 64 * (name == "fab-t")
        assert more <= questions - until + 6, "what was asked is not asked again, but for clean passes"


def test_the_snapshot_of_other_samples_is_not_taken(victim):
    memory = AttackMemory()
    with pytest.raises(Stopped):
        attack(victim, "apgd-ce", 1, memory, 5)
    kept = on_disk(memory.snapshot()) | {"seeds": victim.seeds[20:40]}
    assert attack(victim, "apgd-ce", 1, AttackMemory(kept))[0].adv.equal(attack(victim, "apgd-ce", 1)[0].adv)
