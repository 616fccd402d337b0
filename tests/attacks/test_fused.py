"""Fused arithmetic finds what the plain one finds, sample by sample, for any number of samples, by one graph."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

from mmtard.attacks import ensemble, fused, pgd, registry, threat_model
from mmtard.attacks.fab import project_to_hyperplane
from mmtard.attacks.pgd import pgd_step
from mmtard.attacks.state import AttackSettings
from mmtard.config.attack import Attack, Ramp
from mmtard.distillation.training_attack import _one_step, perturb

SETTINGS = {"iters": 8, "targets": 3, "restarts": 2, "queries": 80}
ATTACKS = ["pgd", "apgd-ce", "apgd-t", "fab-t"]
TRAINING = {  # the settings of a training's attack, by the function that is a step of it
    "_stepped": {"steps": 3},
    "_carried": {"steps": 4, "momentum": 0.9},
    "_one_step": {"steps": 1, "algorithm": "nfgsm"},
}


@pytest.fixture
def compiler(monkeypatch):
    """torch.compile, which this suite otherwise switches off, with no graph made yet."""
    monkeypatch.setattr(fused, "_graphs", {})
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs(compiler, monkeypatch):
    """By function, how often it was made a graph, of torch's own kernels: no C++ compiler is asked for."""
    made = Counter()
    torch_compile = torch.compile

    def compile(function, **settings):
        def backend(graph, inputs):
            made[function.__name__] += 1
            return graph.forward

        return torch_compile(function, backend=backend, **settings)

    monkeypatch.setattr(torch, "compile", compile)
    return made


def attack(victim, name, norm="linf", say=None):
    eps = victim.eps if norm == "linf" else 0.6
    batch = victim.images, victim.labels, victim.seeds
    with fused.fused(fused.Fusion(say)) if say else nullcontext():
        return ensemble.run_attacks(victim.model, *batch, [name], AttackSettings(eps=eps, norm=norm, **SETTINGS))


def assert_same(one, other):
    assert one.broken_by == other.broken_by
    assert one.adv.equal(other.adv) and one.prediction.equal(other.prediction)
    assert one.facts.queries == other.facts.queries


@pytest.mark.slow  # it imports the compiler
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_ends_the_same_and_a_smaller_batch_makes_no_graph(name, norm, victim, graphs):
    said = []
    assert_same(attack(victim, name, norm, said.append), attack(victim, name, norm))
    assert graphs and not said
    assert set(graphs.values()) <= {1}, graphs


@pytest.mark.slow  # it imports the compiler
def test_every_radius_has_the_same_graphs(victim, graphs, monkeypatch):
    for eps in (2 / 255, 4 / 255, 8 / 255, 12 / 255):
        monkeypatch.setattr(victim, "eps", eps)
        assert_same(attack(victim, "pgd", say=print), attack(victim, "pgd"))
    assert graphs == {"_started": 1, "_stepped": 1}


def assert_a_ramp_is_the_same(**settings):
    """Updates of a training whose radius grows from one to the next, each of another number of samples."""
    attack = Attack(eps="8/255", step_size="3/255", ramp=Ramp(until=3, eps="1/4"), **settings)
    weights = torch.randn(3 * 8 * 8, generator=torch.Generator().manual_seed(0))

    def loss(x):
        return (x.flatten(1) * weights).sum(1).sin()

    for update, size in enumerate((4, 7, 2, 5)):
        x, seeds = torch.rand(size, 3, 8, 8, generator=torch.Generator().manual_seed(update)), torch.arange(size) - 1
        plain = perturb(attack.at(update), loss, x, seeds)
        with fused.fused(fused.Fusion(pytest.fail)):
            assert perturb(attack.at(update), loss, x, seeds).equal(plain), (update, settings)


@pytest.mark.slow  # it imports the compiler
@pytest.mark.parametrize("step, norm", [*((step, "linf") for step in TRAINING), ("_stepped", "l2"), ("_carried", "l2")])
def test_a_trainings_attack_has_the_same_graphs_for_every_radius_and_batch(step, norm, graphs):
    assert_a_ramp_is_the_same(norm=norm, **TRAINING[step])
    assert graphs == {"_started": 1, step: 1}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
def test_kernels_of_torch_inductor_give_a_trainings_attack_bit_by_bit(compiler):
    for settings in TRAINING.values():
        assert_a_ramp_is_the_same(**settings)
    assert set(fused._graphs) == {f.__wrapped__ for f in (threat_model._started, pgd._stepped, pgd._carried, _one_step)}


TOO_MANY = """
import functools, torch
from mmtard.attacks.fused import Fusion, fused
from mmtard.attacks.pgd import _stepped

torch.compile = functools.partial(torch.compile, backend="eager")
torch._dynamo.config.recompile_limit = 1
x, gradient = torch.rand(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
with fused(Fusion(print)) as fusion:
    found = [_stepped(x, gradient, x, norm, 0.1, 0.05) for norm in ("linf", "l2")]
plain = [_stepped(x, gradient, x, norm, 0.1, 0.05) for norm in ("linf", "l2")]
print(fusion.failed and all(map(torch.equal, found, plain)))
"""


@pytest.mark.slow
def test_a_function_with_too_many_graphs_goes_on_without():
    """In a process of its own: where the limit is hit, torch leaves its hook in the interpreter."""
    env = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    done = subprocess.run([sys.executable, "-c", TOO_MANY], capture_output=True, text=True, env=env)
    line, equal = done.stdout.splitlines()
    assert line.startswith("the attacks' arithmetic is not fused: _stepped: FailOnRecompileLimitHit: ")
    assert equal == "True"


@pytest.mark.slow  # it imports the compiler
def test_outside_of_it_and_for_a_single_sample_nothing_is_compiled(victim, graphs):
    attack(victim, "apgd-ce")
    x = victim.images[:1]
    with fused.fused(fused.Fusion(print)):
        project_to_hyperplane(x, torch.ones_like(x), torch.ones(1), "linf")
    assert not graphs


@pytest.mark.slow  # it imports the compiler
def test_the_callers_tensors_keep_no_mark(compiler):
    x = torch.rand(4, 3, 8, 8)
    with fused.fused(fused.Fusion(print)):
        pgd_step(lambda images: images.sum((1, 2, 3)), x, x, norm="linf", eps=0.1, step_size=0.1)
    assert not vars(x)


def test_without_a_compiler_every_evaluation_says_so_once_and_goes_on(victim, monkeypatch):
    def broken(*_):
        raise TorchDynamoException("no C++ compiler\nfound")

    monkeypatch.setattr(fused, "_graphs", {})
    monkeypatch.setattr(torch, "compile", lambda function, **settings: broken)
    for _ in range(2):
        said = []
        assert_same(attack(victim, "apgd-ce", say=said.append), attack(victim, "apgd-ce"))
        line = "the attacks' arithmetic is not fused: _started: TorchDynamoException: no C++ compiler found"
        assert said == [line]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
@pytest.mark.parametrize("name", ATTACKS)
def test_kernels_of_torch_inductor_break_the_same_samples(name, victim, compiler):
    said = []
    quick, plain = attack(victim, name, say=said.append), attack(victim, name)
    assert quick.broken_by == plain.broken_by and not said
    if name != "fab-t":  # it adds up pixels, whose order is the kernel's
        assert quick.adv.equal(plain.adv)


def test_no_attack_is_forgotten():
    others = {"apgd-dlr", "transfer"}, {"square"}, {"autoattack"}  # APGD's arithmetic; too little of it; the library's
    assert set(ATTACKS).union(*others) == set(registry.ATTACKS)
