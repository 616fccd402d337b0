"""Distillation with plain modules as the engine's student and the teachers."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

from mmtard.attacks import pgd
from mmtard.config import validate
from mmtard.distill import Distillation, perturb
from mmtard.methods import Head, Pass, find

B, C, D, STEPS, EPS = 6, 5, 8, 3, 4 / 255
LABELS, SEEDS = torch.tensor([0, 1, 2, 3, 4, 0]), torch.arange(10, 10 + B)
IMAGES = torch.rand(B, 3, 4, 4, generator=torch.Generator().manual_seed(0))


class Tower(torch.nn.Module):
    """Embeddings of a small nonlinear map, twice as sensitive in training mode; notes each call."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.map, self.calls = torch.nn.Linear(48, D), []

    def forward(self, images):
        self.calls.append((images.detach().clone(), self.training, torch.is_grad_enabled()))
        return torch.tanh(self.map(images.flatten(1)) * (4 if self.training else 2))


class Student:
    """What the engine offers: one differentiated call in training mode, an attack view in evaluation mode."""

    def __init__(self):
        self.tower, self.views = Tower(0).train(), 0

    def __call__(self, images, seeds, tokens=False):
        assert self.tower.training and torch.equal(seeds, SEEDS)
        return self.tower(images)

    @contextmanager
    def attack_view(self):
        self.views += 1
        self.tower.eval()
        yield self.tower
        self.tower.train()


class Teacher:
    def __init__(self, seed, head):
        self.tower, self.head = Tower(seed).eval().requires_grad_(False), head

    def __call__(self, images, tokens=False):
        return self.head(self.tower(images))


def setting(method, attack=None):
    """A Distillation, its student and its teachers; a teacher that the configuration does not name does not exist."""
    needs = {"clean": [], "tecoa": [], "ard": ["robust"], "mmtard": ["clean", "robust"]}[method["name"]]
    attack = {"eps": "4/255", "step_size": "2/255", "steps": STEPS, **(attack or {})}
    config = validate({
        "run_dir": "r", "student": {"weights": "random"}, "teachers": {n: {"weights": "random"} for n in needs},
        "method": method, "attack": attack, "data": {"shards": "s", "lanes": 2}, "train": {"steps": 1, "batch_size": B},
    })  # fmt: skip
    head = Head(F.normalize(torch.randn(C, D, generator=torch.Generator().manual_seed(9)), dim=-1), 10.0)
    student, teachers = Student(), {n: Teacher(seed, head) for seed, n in enumerate(needs, 1)}
    return Distillation(config, student, head, teachers), student, {n: t.tower for n, t in teachers.items()}


CASES = [
    # method, attack, calls of each teacher by view, forwards of the attack, views of the student's one forward
    ({"name": "clean"}, {}, {}, 0, ["clean"]),
    ({"name": "tecoa"}, {}, {}, STEPS, ["adv"]),
    ({"name": "tecoa"}, {"objective": "kl_self"}, {}, STEPS + 1, ["adv"]),
    ({"name": "tecoa"}, {"algorithm": "apgd"}, {}, STEPS + 1, ["adv"]),
    ({"name": "ard"}, {}, {"robust": ["clean"]}, STEPS, ["adv"]),
    ({"name": "ard", "alpha": 0.5}, {"objective": "kl_robust"}, {"robust": ["clean"]}, STEPS, ["adv", "clean"]),
    ({"name": "ard", "teacher_view": "adv"}, {}, {"robust": ["adv"]}, STEPS, ["adv"]),
    ({"name": "ard", "teacher_view": "adv"}, {"objective": "kl_robust"}, {"robust": ["clean", "adv"]}, STEPS, ["adv"]),
    ({"name": "mmtard"}, {}, {"clean": ["clean"], "robust": ["adv"]}, STEPS, ["adv", "clean"]),
    ({"name": "mmtard"}, {"objective": "kl_robust"}, {"clean": ["clean"], "robust": ["clean", "adv"]}, STEPS, ["adv", "clean"]),
]


@pytest.mark.parametrize("method,attack,teacher_views,attack_forwards,student_views", CASES)
def test_exactly_the_declared_passes_are_computed(method, attack, teacher_views, attack_forwards, student_views):
    distillation, student, teachers = setting(method, attack)
    loss, terms = distillation(IMAGES, LABELS, SEEDS)

    attacking, training = ([c for c in student.tower.calls if c[1] is mode] for mode in (False, True))
    assert len(attacking) == attack_forwards and student.views == (attack_forwards > 0)
    assert len(training) == 1 and training[0][2], "one differentiated forward"
    seen = dict(zip(student_views, training[0][0].split(B)))
    assert len(training[0][0]) == B * len(student_views)
    assert seen.get("clean", IMAGES).equal(IMAGES)
    if "adv" in seen:
        size = (seen["adv"] - IMAGES).abs()
        assert (size.flatten(1).amax(1) > EPS / 2).all() and size.max() <= EPS + 1e-7
        assert 0 <= seen["adv"].min() and seen["adv"].max() <= 1
    views = {"clean": IMAGES, "adv": seen.get("adv")}
    assert {n: len(t.calls) for n, t in teachers.items()} == {n: len(v) for n, v in teacher_views.items()}
    for name, asked in teacher_views.items():
        assert all(call[0].equal(views[v]) for call, v in zip(teachers[name].calls, asked))

    # The loss is the method's on predictions made one view at a time.
    outputs = {Pass(n, v): t(views[v]) for n, t in teachers.items() for v in teacher_views[n]}
    outputs |= {Pass("student", v): student.tower(views[v]) for v in student_views}
    expected, _ = find(method["name"]).loss(distillation.settings, {p: distillation.head(z) for p, z in outputs.items()}, LABELS, distillation.state)
    assert loss.shape == (B,) and torch.allclose(loss, expected, rtol=1e-5, atol=1e-6)  # float32, another batch size
    assert not any(t.requires_grad for t in terms.values())


@pytest.mark.parametrize("case", [c[:2] for c in CASES])
def test_backward_trains_the_student_alone_and_the_attack_leaves_no_gradient(case):
    distillation, student, teachers = setting(*case)
    loss, _ = distillation(IMAGES, LABELS, SEEDS)
    assert all(p.grad is None for p in student.tower.parameters())
    loss.mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in student.tower.parameters())
    assert all(p.grad is None for t in teachers.values() for p in t.parameters())


OBJECTIVES = {"ce": None, "kl_clean": "clean", "kl_robust": "robust", "kl_self": "student"}


@pytest.mark.parametrize("objective,model", OBJECTIVES.items())
def test_the_adversarial_images_maximise_the_objective_in_evaluation_mode(objective, model):
    """Against a direct call of pgd with the loss in plain PyTorch."""
    distillation, student, teachers = setting({"name": "mmtard"}, {"objective": objective, "momentum": 0.9, "steps": 12, "eps": "32/255", "step_size": "16/255"})
    distillation(IMAGES, LABELS, SEEDS)
    adv = student.tower.calls[-1][0][:B]
    student.tower.eval()
    target = model and F.softmax(distillation.head((teachers | {"student": student.tower})[model](IMAGES)).logits, -1).detach()

    def loss(x):
        log_p = F.log_softmax(distillation.head(student.tower(x)).logits, -1)
        if model is None:
            return F.nll_loss(log_p, LABELS, reduction="none")
        return F.kl_div(log_p, target, reduction="none").sum(-1)

    expected = pgd(loss, IMAGES, norm="linf", eps=32 / 255, step_size=16 / 255, steps=12, momentum=0.9, seeds=SEEDS)
    # The target's softmax rounds elsewhere; no gradient here is so near zero that its sign could change.
    assert torch.allclose(adv, expected, rtol=0, atol=1e-6)
    assert (loss(adv) > loss(IMAGES)).all()


def test_kl_self_measures_from_the_clean_image_in_evaluation_mode_without_gradient():
    distillation, student, _ = setting({"name": "tecoa"}, {"objective": "kl_self"})
    distillation(IMAGES, LABELS, SEEDS)
    first, *rest, last = student.tower.calls
    assert first[0].equal(IMAGES) and first[1:] == (False, False)
    assert all(grad and not training for _, training, grad in rest)
    assert last[1]


def test_the_attack_section_reaches_the_attack():
    small, large = (setting({"name": "tecoa"}, {"norm": "l2", "eps": e, "step_size": 1, "random_start": False})[0] for e in (0.1, 0.3))
    for distillation, eps in ((small, 0.1), (large, 0.3)):
        starts = []
        adv = perturb(distillation.attack, lambda x: starts.append(x.detach().clone()) or x.flatten(1) @ torch.linspace(-1, 1, 48), IMAGES, SEEDS)
        assert starts[0].equal(IMAGES) and len(starts) == STEPS
        assert (adv - IMAGES).flatten(1).norm(dim=1).max() == pytest.approx(eps, rel=0.05)  # the range cuts a little off
