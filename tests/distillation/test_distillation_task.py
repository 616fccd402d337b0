"""Distillation with plain modules as the engine's student and the teachers."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

from mmtard import seeding
from mmtard.attacks.pgd import pgd
from mmtard.config import validate
from mmtard.distillation import attack_objectives
from mmtard.distillation.methods import Pass, find_method
from mmtard.distillation.task import DistillationTask
from mmtard.distillation.training_attack import perturb
from mmtard.zero_shot import ZeroShotHead

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
    def attack_forward(self):
        self.views += 1
        self.tower.eval()
        yield self.tower
        self.tower.train()


class Teacher:
    def __init__(self, seed, head):
        self.tower, self.head = Tower(seed).eval().requires_grad_(False), head

    @torch.no_grad()
    def __call__(self, images, tokens=False):
        return self.head(self.tower(images))

    def differentiable(self, images):
        return self.head(self.tower(images))


def setting(method, attack=None):
    """A Distillation, its student and its teachers; a teacher that the configuration does not name does not exist."""
    needs = {"ard": ["robust"], "rslad": ["robust"], "adaad": ["robust"], "mmtard": ["clean", "robust"]}.get(
        method["name"], []
    )
    untouched = (
        ["start"] if method["name"] in ("fare", "sim_clip", "pmg_aft") else []
    )  # which the configuration need not list
    attack = {"eps": "4/255", "step_size": "2/255", "steps": STEPS, **(attack or {})}
    config = validate(
        {
            "run_dir": "r",
            "student": {"weights": "random"},
            "teachers": {n: {"weights": "random"} for n in needs},
            "method": method,
            "attack": attack,
            "data": {"shards": "s", "lanes": 2},
            "train": {"steps": 1, "batch_size": B},
        }
    )
    head = ZeroShotHead(F.normalize(torch.randn(C, D, generator=torch.Generator().manual_seed(9)), dim=-1), 10.0)
    student, teachers = Student(), {n: Teacher(seed, head) for seed, n in enumerate([*needs, *untouched], 1)}
    return DistillationTask(config, student, head, teachers), student, {n: t.tower for n, t in teachers.items()}


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
    (
        {"name": "mmtard"},
        {"objective": "kl_robust"},
        {"clean": ["clean"], "robust": ["clean", "adv"]},
        STEPS,
        ["adv", "clean"],
    ),
    (
        {"name": "mmtard"},
        {"objective": "kl_fused"},
        {"clean": ["clean"], "robust": ["clean", "adv"]},
        STEPS,
        ["adv", "clean"],
    ),
    ({"name": "fare"}, {}, {"start": ["clean"]}, STEPS, ["adv"]),
    ({"name": "pmg_aft"}, {}, {"start": ["adv"]}, STEPS, ["adv", "clean"]),
    ({"name": "trades"}, {}, {}, STEPS + 1, ["adv", "clean"]),
    ({"name": "tecoa"}, {"objective": "ce_targeted"}, {}, STEPS, ["adv"]),
    ({"name": "tecoa"}, {"steps": 1}, {}, 1, ["adv"]),
    ({"name": "rslad"}, {"restarts": 3}, {"robust": ["clean"]}, 3 * STEPS + 3, ["adv", "clean"]),
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
    expected, _ = find_method(method["name"]).loss(
        distillation.settings, {p: distillation.head(z) for p, z in outputs.items()}, LABELS, distillation.state
    )
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
    distillation, student, teachers = setting(
        {"name": "mmtard"},
        {"objective": objective, "momentum": 0.9, "steps": 12, "eps": "32/255", "step_size": "16/255"},
    )
    distillation(IMAGES, LABELS, SEEDS)
    adv = student.tower.calls[-1][0][:B]
    student.tower.eval()
    target = (
        model
        and F.softmax(distillation.head((teachers | {"student": student.tower})[model](IMAGES)).logits, -1).detach()
    )

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
    small, large = (
        setting({"name": "tecoa"}, {"norm": "l2", "eps": e, "step_size": 1, "random_start": False})[0]
        for e in (0.1, 0.3)
    )
    for distillation, eps in ((small, 0.1), (large, 0.3)):
        starts = []
        adv = perturb(
            distillation.attack,
            lambda x: starts.append(x.detach().clone()) or x.flatten(1) @ torch.linspace(-1, 1, 48),
            IMAGES,
            SEEDS,
        )
        assert starts[0].equal(IMAGES) and len(starts) == STEPS
        assert (adv - IMAGES).flatten(1).norm(dim=1).max() == pytest.approx(
            eps, rel=0.05
        )  # the range cuts a little off


# ---------------------------------------------------------------- restarts, moving teachers, stored embeddings, state


def test_each_sample_keeps_the_worst_of_its_restarts_whatever_its_batch():
    w = torch.linspace(-1, 1, 48)

    def bumpy(x):  # many local maxima, so that the start matters
        return torch.sin(200 * (x.flatten(1) * w).sum(1)) + torch.cos(70 * x.flatten(1).sum(1))

    one, four = (setting({"name": "tecoa"}, {"eps": "16/255", "restarts": n})[0].attack for n in (1, 4))
    single, several = (perturb(attack, bumpy, IMAGES, SEEDS) for attack in (one, four))
    each = [perturb(one, bumpy, IMAGES, seeding.derive_seeds(SEEDS, r) if r else SEEDS) for r in range(4)]
    assert each[0].equal(single) and not any(a.equal(single) for a in each[1:])
    best = torch.stack([bumpy(a) for a in each]).max(0)
    assert bumpy(several).equal(best.values) and len(set(best.indices.tolist())) > 1
    assert all(several[i].equal(each[r][i]) for i, r in enumerate(best.indices.tolist()))
    assert perturb(four, bumpy, IMAGES[2:4], SEEDS[2:4]).equal(several[2:4])


def test_the_adaptive_attack_follows_the_gradient_through_the_teacher():
    """Against pgd with the plain formula, both networks moving; its input gradient against float64."""
    distillation, student, teachers = setting({"name": "adaad"}, {"steps": 5, "eps": "32/255", "step_size": "16/255"})
    loss, _ = distillation(IMAGES, LABELS, SEEDS)
    adv = student.tower.calls[-1][0]
    assert [len(student.tower.calls), len(teachers["robust"].calls)] == [5 + 1, 5 + 1]
    assert [grad for *_, grad in teachers["robust"].calls] == [True] * 5 + [False]
    assert all(p.grad is None for t in (student.tower, teachers["robust"]) for p in t.parameters())
    student.tower.eval()

    def plain(x, text=distillation.head.class_embeddings):
        p, q = (F.softmax(10 * F.normalize(t(x), dim=-1) @ text.T, -1) for t in (teachers["robust"], student.tower))
        return (p * (p / q).log()).sum(-1)

    assert torch.allclose(
        adv, pgd(plain, IMAGES, norm="linf", eps=32 / 255, step_size=16 / 255, steps=5, seeds=SEEDS), atol=1e-6
    )
    x = IMAGES.clone().requires_grad_()
    maximise = attack_objectives.attack_loss(distillation.objective, {}, LABELS, SEEDS)
    ours = torch.autograd.grad(
        maximise(distillation.head(student.tower(x)), distillation.teachers["robust"].differentiable(x)).sum(), x
    )[0]
    x = IMAGES.double().requires_grad_()
    student.tower.double(), teachers["robust"].double()
    exact = torch.autograd.grad(plain(x, distillation.head.class_embeddings.double()).sum(), x)[0]
    assert (ours - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize("method", [{"name": "mmtard"}, {"name": "fare"}])
def test_stored_embeddings_stand_for_a_teacher_on_the_clean_images_alone(method):
    name = "start" if method["name"] == "fare" else "clean"
    live = setting(method)[0](IMAGES, LABELS, SEEDS)
    distillation, _, teachers = setting(method)
    stored = teachers[name](IMAGES).detach()
    teachers[name].calls.clear()
    loss, terms = distillation(IMAGES, LABELS, SEEDS, {name: stored})
    assert loss.equal(live[0]) and all(terms[k].equal(live[1][k]) for k in terms) and not teachers[name].calls
    changed, _ = setting(method)[0](IMAGES, LABELS, SEEDS, {name: stored + 1})
    assert not changed.equal(loss)
    robust, _, asked = setting({"name": "ard", "teacher_view": "adv"})
    assert robust(IMAGES, LABELS, SEEDS, {"robust": stored})[0].isfinite().all() and len(asked["robust"].calls) == 1


def test_with_every_view_clean_no_teacher_runs_in_the_loop_and_the_stored_recipe_is_the_live_one():
    """p_r(x) and p_c(x), stored, teach x' and x: nothing that is new at each step is shown to a teacher."""
    method = {
        "name": "mmtard",
        "views": {"robust": "clean_for_adv", "clean": "clean"},
        "temperatures": {"robust": 2.0},
        "trust": "clean",
    }
    live = setting(method, {"objective": "kl_robust"})[0](IMAGES, LABELS, SEEDS)
    distillation, student, teachers = setting(method, {"objective": "kl_robust"})
    stored = {name: tower(IMAGES).detach() for name, tower in teachers.items()}
    for tower in teachers.values():
        tower.calls.clear()
    loss, terms = distillation(IMAGES, LABELS, SEEDS, stored)
    assert not any(tower.calls for tower in teachers.values()), "a teacher was asked though all are stored"
    assert loss.equal(live[0]) and all(terms[k].equal(live[1][k]) for k in terms)
    assert not student.tower.calls[-1][0][:B].equal(IMAGES), "the student's adversarial image is another"


def test_the_medians_of_uncertainty_follow_those_of_the_batches():
    views = {"robust": "clean_for_adv", "clean": "clean"}
    distillation, _, _ = setting(
        {"name": "mmtard", "views": views, "trust": "uncertainty", "weighting": "uniform"}, {"objective": "kl_robust"}
    )
    _, terms = distillation(IMAGES, LABELS, SEEDS)
    assert terms["w_handed_robust"].eq(0).all(), "no median is known before the first step"
    distillation.end_step({"entropy_robust_p50": 0.5})
    assert distillation.state == {"entropy_robust": 0.5}
    distillation.end_step({"entropy_robust_p50": 1.5})
    assert distillation.state == pytest.approx({"entropy_robust": 0.6})
    _, terms = distillation(IMAGES, LABELS, SEEDS)
    entropy = terms["entropy_robust"]
    assert torch.allclose(terms["w_handed_robust"], entropy / (entropy + 0.6))


def test_the_state_of_a_method_moves_with_the_means_it_is_told():
    distillation, _, _ = setting({"name": "mmtard", "weighting": "mtard", "rate": 0.5})
    first, terms = distillation(IMAGES, LABELS, SEEDS)
    assert terms["w_robust"].eq(0.5).all()
    distillation.end_step({"kl_robust": 2.0, "kl_clean": 1.0})
    distillation.end_step({"kl_robust": 2.0, "kl_clean": 0.0})
    again, terms = distillation(IMAGES, LABELS, SEEDS)
    assert terms["w_robust"].eq(0.75).all() and terms["w_clean"].eq(0.25).all()
    assert torch.allclose(again, 0.75 * terms["kl_robust"] + 0.25 * terms["kl_clean"])
    stateless = setting({"name": "tecoa"})[0]
    stateless.end_step({"loss": 1.0})
    assert stateless.state == {}
