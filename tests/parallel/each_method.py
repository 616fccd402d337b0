"""Three steps of every objective on fixed tiny towers and images: under ZeRO as ranks of a launch, or in plain PyTorch.

Usage: each_method.py OUT; one ZeRO stage and teachers' placement a case. Teachers differ in width, resolution and
embedding.
"""

import json
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer

from mmtard import config
from mmtard.data.samples import Batch
from mmtard.distillation.added_terms import learned_parts
from mmtard.distillation.task import DistillationTask
from mmtard.distributed import ranks as process_group
from mmtard.distributed.processes import exit_process
from mmtard.distributed.ranks import Ranks
from mmtard.losses import kl
from mmtard.models.image_tower import ImageTower
from mmtard.runs.metrics import SilentLogger
from mmtard.training import overfitting_alarm
from mmtard.training.overfitting_alarm import OverfittingAlarm
from mmtard.training.step_terms import TermSums
from mmtard.zero_shot import ZeroShotHead

STEPS, BATCH, CLASSES, LR = 3, 8, 5, 1e-3
TOWERS = {  # seed, width, embedding, pixels
    "student": (0, 32, 16, 16),
    "start": (0, 32, 16, 16),
    "clean": (1, 32, 16, 16),
    "robust": (2, 48, 24, 24),
    "third": (3, 16, 8, 8),
}
RESNETS = {"resnet": (4, 4, 16, 64), "wide": (5, 6, 24, 64)}  # their last maps are of 2 x 2 places
CASES = {  # method, attack, ZeRO stage, placement of the teachers[, terms]
    "clean": ({"name": "clean"}, {}, 1, None),
    "tecoa": ({"name": "tecoa"}, {"objective": "ce_targeted", "restarts": 2}, 2, None),
    "fare": (
        {"name": "fare"},
        {},
        2,
        "sharded",
        {"bound": {"multipliers": "sample", "rho": 1e-4, "dual_lr": 50.0}},
    ),
    "sim_clip": ({"name": "sim_clip"}, {}, 3, "replicated"),
    "lore": ({"name": "lore", "bound": {"rho": 1e-3, "dual_every": 2, "hidden": 8}}, {}, 3, "replicated"),
    "agft": ({"name": "agft"}, {"steps": 1, "algorithm": "nfgsm", "alarm_every": STEPS}, 3, "replicated"),
    "tecoa, anchor and features": (
        {"name": "tecoa"},
        {"steps": 2, "step_size": None, "ramp": {"until": 2, "eps": "1/4", "steps": 1}},
        2,
        "replicated",
        {"anchor": {"teacher": "third"}, "feature": {"of": "tokens", "weight": 2.0}, "projection_lr": 1e-2},
    ),
    "tecoa, last maps": (
        {"name": "tecoa"},
        {"eps_factor": 1.4},
        3,
        "sharded",
        {"feature": {"teacher": "wide", "teacher_view": "adv", "of": "tokens", "weight": 2.0}, "projection_lr": 1e-2},
    ),
    "pmg_aft": ({"name": "pmg_aft"}, {}, 2, "replicated"),
    "tga_zsr": ({"name": "tga_zsr", "alpha": 2.0, "beta": 1.0}, {}, 2, "replicated"),
    "tga_zsr, stage 3": ({"name": "tga_zsr", "alpha": 2.0, "beta": 1.0}, {}, 3, "sharded"),
    "trades": ({"name": "trades"}, {}, 3, None),
    "ard": ({"name": "ard"}, {}, 0, "replicated"),
    "rslad": ({"name": "rslad"}, {}, 2, "sharded"),
    "iad": ({"name": "iad"}, {}, 1, "replicated"),
    "adaad": ({"name": "adaad", "alpha": 0.5}, {}, 3, "sharded"),
    "mtard": ({"name": "mtard", "rate": 0.5}, {"steps": 1}, 2, "replicated"),
    "mmtard": ({"name": "mmtard", "trust": "label"}, {"objective": "kl_fused"}, 2, "sharded"),
    "mmtard, more weight for harder samples, and the feature term": (
        {"name": "mmtard", "weighting": "hardness"},
        {},
        2,
        "replicated",
        {"feature": {"teacher": "third", "weight": 2.0}, "projection_lr": 1e-2},
    ),
    "mmtard, by entropy": ({"name": "mmtard", "weighting": "entropy"}, {"steps": 1, "step_size": None}, 3, "sharded"),
    "mmtard, a teacher of x for x', by the student where it is unsure": (
        {
            "name": "mmtard",
            "weighting": "uniform",
            "views": {"clean": "clean", "robust": "clean_for_adv"},
            "temperatures": {"robust": 2.0},
            "trust": "uncertainty",
        },
        {"objective": "kl_robust"},
        1,
        "replicated",
    ),
    "mmtard, three teachers": (
        {
            "name": "mmtard",
            "weighting": "mtard",
            "rate": 0.5,
            "cross_modal_weight": 1.0,
            "trust": "clean",
            "views": {"clean": "clean", "third": "adv", "robust": "adv"},
        },
        {},
        2,
        "sharded",
    ),
}


STUDENTS = {"tecoa, last maps": "resnet"}  # case -> another student than `student`


def tower(name: str) -> ImageTower:
    seed, width, embedding, pixels = {**TOWERS, **RESNETS}[name]
    torch.manual_seed(seed)
    if name in RESNETS:
        visual = ModifiedResNet([1, 1, 1, 1], output_dim=embedding, heads=4, image_size=pixels, width=width)
        for parameter in (p for key, p in visual.named_parameters() if key.endswith("bn3.weight")):
            torch.nn.init.ones_(parameter)  # open_clip begins with no residual branch
        return ImageTower(visual, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)).train()
    visual = VisionTransformer(
        image_size=pixels, patch_size=8, width=width, layers=2, heads=2, mlp_ratio=2, output_dim=embedding
    )
    return ImageTower(visual, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def head(name: str) -> ZeroShotHead:
    embedding = {**TOWERS, **RESNETS}[name][2]
    return ZeroShotHead(
        F.normalize(torch.randn(CLASSES, embedding, generator=torch.Generator().manual_seed(100 + embedding)), dim=-1),
        20.0,
    )


def settings(case: str) -> config.Config:
    method, attack, stage, placement, *terms = CASES[case]
    terms = terms[0] if terms else {}
    named = set(config.Config.model_fields["terms"].annotation(**terms).teachers.values()) - {config.START}
    teachers = {
        name: {"placement": placement} | ({} if name == "start" else {"weights": "random"})
        for name in sorted({*config.METHODS[method["name"]](**method).teachers, *named})
    }
    return config.validate(
        {
            "run_dir": "unused",
            "student": {"arch": "unused", "weights": "random"},
            "teachers": teachers,
            "method": method,
            "terms": terms,
            "attack": {"eps": "8/255", "step_size": "2/255", "steps": 2, "alarm_every": None, **attack},
            "data": {"shards": "unused", "lanes": BATCH},
            "train": {"steps": STEPS, "batch_size": BATCH, "lr": LR, "weight_decay": 0.1},
            "engine": {"zero_stage": stage, "precision": "float32", "device": "cpu"},
        }
    )


def batches():
    g = torch.Generator().manual_seed(200)
    for _ in range(STEPS):
        yield (
            torch.rand(BATCH, 3, 16, 16, generator=g),
            torch.randint(CLASSES, (BATCH,), generator=g),
            torch.randint(2**60, (BATCH,), generator=g),
        )


class Plain:
    """A student in plain PyTorch, and its optimiser."""

    def __init__(self, tower: ImageTower, lr: float):
        from mmtard.training.optimizer import parameter_groups

        self.tower = tower
        self.adam = torch.optim.AdamW(parameter_groups(tower, 0.1), lr=lr)

    def __call__(self, images, seeds, tokens=False):
        return self.tower(images, tokens=tokens)

    @contextmanager
    def attack_forward(self):
        yield self.tower

    def backward(self, loss):
        self.adam.zero_grad()
        loss.backward()

    def end_micro_batch(self, lr):
        self.adam.step()

    def full_state(self):
        return self.tower.state_dict(), {}, STEPS


class PlainTeacher:
    def __init__(self, tower: ImageTower, head: ZeroShotHead):
        self.tower, self.head = tower.requires_grad_(False), head

    @torch.no_grad()
    def __call__(self, images, tokens=False):
        z = self.tower(images, tokens=tokens)
        return self.head(*z) if tokens else self.head(z)

    def differentiable(self, images):
        return self.head(self.tower(images))


def plain_teacher(name: str) -> PlainTeacher:
    return PlainTeacher(tower(name), head(name))


def train(case: str, student, teachers: dict, ranks=None) -> dict:
    """Losses, the method's state and the weights after three steps; `ranks` share each batch."""
    widths = {name: embedding for name, (_, _, embedding, _) in {**TOWERS, **RESNETS}.items()}
    places = {name: tower(called(case, name)).place_width for name in settings(case).token_models}
    learned = learned_parts(settings(case), widths, samples=BATCH, places=places)
    step = DistillationTask(settings(case), student, head("student"), teachers, learned)
    share = (
        slice(None)
        if ranks is None
        else slice(ranks.rank * BATCH // ranks.world_size, (ranks.rank + 1) * BATCH // ranks.world_size)
    )
    losses, spread = [], {}
    for update, batch in enumerate(batches()):
        step.begin_step(update)
        loss, terms = step(*(part[share] for part in batch), samples=torch.arange(BATCH)[share])
        student.backward(loss.mean())
        student.end_micro_batch(LR)
        learned.update(
            update, True, 1.0, process_group.reduce if ranks else lambda x: None, ranks.world_size if ranks else 1
        )
        told = TermSums()
        told.add({"loss": loss.detach(), **terms})
        # Without ranks, this one's numbers are all there are.
        total = told.unpack(told.pack([])[None].numpy(), 0) if ranks is None else told.total([], ranks)
        means, spread = {name: sum_ / BATCH for name, sum_ in total.sums.items()}, total.quantiles
        step.end_step(means | spread)
        losses.append(means["loss"])
    weights = {**student.full_state()[0], **learned.tensors()}
    found = {"losses": losses, "state": step.state, "spread": spread, "weights": weights}
    return found | {"alarm": asked_by_the_alarm(settings(case), step, share, ranks)}


def asked_by_the_alarm(config, task: DistillationTask, share: slice, ranks) -> list:
    """What the alarm decides by after the last step (right under one step, under ten, of how many); [] without one."""
    asked, decide = [], overfitting_alarm.overfitted
    alone = SimpleNamespace(device=torch.device("cpu"), sum=lambda numbers: numbers)
    images, labels, seeds = (part[share] for part in list(batches())[-1])
    batch = Batch((images * 255).round().byte(), labels, torch.arange(len(labels)), seeds, [""] * len(labels))
    overfitting_alarm.overfitted = lambda *numbers: asked.append([int(n) for n in numbers[:3]])
    try:
        OverfittingAlarm(config, task, ranks or alone, BATCH, SilentLogger()).after_step(STEPS, batch)
    finally:
        overfitting_alarm.overfitted = decide
    return asked


def called(case: str, name: str) -> str:
    return STUDENTS.get(case, name) if name == "student" else name


def plain(case: str) -> dict:
    return train(
        case, Plain(tower(called(case, "student")), LR), {name: plain_teacher(name) for name in settings(case).ensemble}
    )


def zero(case: str, ranks: Ranks) -> dict:
    from mmtard.models.teachers import FrozenTeacher
    from mmtard.training.engine import Engine

    cfg = settings(case)
    teachers = {
        name: FrozenTeacher(name, t, tower(name), head(name), ranks, torch.float32) for name, t in cfg.ensemble.items()
    }
    return train(case, Engine(cfg, tower(called(case, "student")), ranks), teachers, ranks)


def through_a_teacher(placement: str, ranks: Ranks) -> dict[str, torch.Tensor]:
    """A teacher's logits, and the gradient of KL(p_T(x) || p_S(x)) to the images through the teacher, twice: as in
    two attack steps.
    """
    from mmtard.models.teachers import FrozenTeacher

    spec = config.Teacher(weights="random", placement=placement)
    teacher = FrozenTeacher("robust", spec, tower("robust"), head("robust"), ranks, torch.float32)
    student, found = plain_teacher("student"), {}
    for i, (images, *_) in zip(range(2), batches()):
        images = images[ranks.rank :: ranks.world_size].requires_grad_()
        logits = teacher.differentiable(images).logits
        (gradient,) = torch.autograd.grad(kl(logits, student.differentiable(images).logits).sum(), images)
        found |= {f"logits{i}": logits.detach(), f"gradient{i}": gradient}
    assert all(p.grad is None for p in teacher.tower.parameters())
    return found


if __name__ == "__main__":
    ranks = process_group.start("cpu")
    results = {case: zero(case, ranks) for case in CASES}
    placements = {p: through_a_teacher(p, ranks) for p in ("replicated", "sharded")}
    if ranks.is_first:
        torch.save({case: r["weights"] for case, r in results.items()} | placements, sys.argv[1])
        with open(f"{sys.argv[1]}.json", "w") as out:
            json.dump({case: {k: v for k, v in r.items() if k != "weights"} for case, r in results.items()}, out)
    process_group.stop()
    exit_process(0)
