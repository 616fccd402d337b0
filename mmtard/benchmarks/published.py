"""The training step of the published MMT-ARD code in plain PyTorch, with what makes it slow; and a lean one without.

Rendered from a description of the public code: float32 and eager; the attack differentiates a student whose weights ask
for gradients; the towers are open_clip's as they come; a third teacher is asked and thrown away; the clean teacher is
asked again every epoch; AdamW over all weights. Its loss and its attack are those of mmtard's `official` weighting with
momentum 0, which a test compares.
Kinder than the original in two things: teachers run without a graph, and nothing empties the allocator's cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Config
from ..errors import UserError
from ..models.attack_copy import frozen_twin
from ..models.image_tower import ImageTower
from ..seeding import sample_uniform
from ..zero_shot import ZeroShotHead
from .phases import PhaseClock


@dataclass
class PublishedModels:
    """The models of the published step: image towers in float32, and what turns their embeddings into logits."""

    student: ImageTower
    clean: ImageTower
    robust: ImageTower
    third: ImageTower  # its predictions are not used
    student_head: ZeroShotHead
    clean_head: ZeroShotHead
    robust_head: ZeroShotHead


@dataclass(frozen=True)
class PublishedOptions:
    """What of the published step is done otherwise.

    third_teacher: ask it. clean_embeddings: those of the clean teacher [B,D], instead of asking it. frozen_attack: the
    attack differentiates a twin of the student, whose weights ask for no gradient.
    """

    third_teacher: bool = True
    clean_embeddings: Tensor | None = None
    frozen_attack: bool = False


def check_comparable(config: Config, world_size: int = 1) -> None:
    """UserError for a configuration whose step has another loss or attack than the published one, or several ranks."""
    method, attack, terms = config.method, config.attack, config.terms
    remedy = "take benchmarks/vitb32_vitl14, or leave --against out"
    if method.name != "mmtard":
        raise UserError(f"method.name: '{method.name}', but the published step is that of 'mmtard'; {remedy}")
    published = {
        "method.weighting": (method.weighting, "official"),
        "method.views": (method.views, {"clean": "clean", "robust": "adv"}),
        "method.temperatures": (method.temperatures, {}),
        "method.trust": (method.trust, "whole"),
        "method.cross_modal_weight": (method.cross_modal_weight, 0),
        "attack.objective": (config.attack_objective, "kl_clean"),
        "attack.algorithm": (attack.algorithm, "pgd"),
        "attack.norm": (attack.norm, "linf"),
        "attack.momentum": (attack.momentum, 0),
        "attack.restarts": (attack.restarts, 1),
        "attack.random_start": (attack.random_start, True),
    }
    for place, (value, theirs) in published.items():
        if value != theirs:
            raise UserError(f"{place}: {value!r}, but the published step has {theirs!r}; set that, or {remedy}")
    added = {"attack.ramp": attack.ramp}
    added |= {f"terms.{name}": getattr(terms, name) for name in ("anchor", "feature", "bound")}
    for place, part in added.items():
        if part is not None:
            found = part.model_dump(mode="json", exclude_none=True)
            words = ", ".join(f"{name} {value}" for name, value in found.items())
            raise UserError(f"{place}: {words}, which the published step does not have; set {place}=null, or {remedy}")
    if world_size > 1:
        raise UserError(
            f"--against: the published step has no gradients of other ranks, and here are {world_size}; start one "
            "process, or leave --against out"
        )


class PublishedStep:
    """One student and its AdamW: each call is one update on images [B,3,H,W], labels and seeds int64 [B].

    Several variants may share it: what differs comes with the call. The configuration is one that `check_comparable`
    accepts.
    """

    def __init__(self, config: Config, models: PublishedModels, clock: PhaseClock):
        self.settings, self.attack, self.models, self.clock = config.method, config.attack.at(0), models, clock
        train = config.train
        self.optimizer = torch.optim.AdamW(
            models.student.parameters(), lr=train.lr, betas=train.betas, weight_decay=train.weight_decay
        )
        self.twin = frozen_twin(models.student)

    def __call__(
        self, images: Tensor, labels: Tensor, seeds: Tensor, options: PublishedOptions = PublishedOptions()
    ) -> tuple[Tensor, Tensor]:
        """(the batch's loss, a scalar; its adversarial images [B,3,H,W]), after the update."""
        models = self.models
        with self.clock("teachers"), torch.no_grad():
            z_clean = models.clean(images) if options.clean_embeddings is None else options.clean_embeddings
            clean = models.clean_head(z_clean)
            if options.third_teacher:
                models.third(images)
        with self.clock("attack"):
            adv = self._attack(self.twin if options.frozen_attack else models.student, images, seeds, clean.logits)
        with self.clock("teachers"), torch.no_grad():
            robust = models.robust_head(models.robust(adv))
        with self.clock("student forward"):
            models.student.train()
            on_adv = models.student_head(models.student(adv)).logits
            on_clean = models.student_head(models.student(images)).logits
            of_class = labels[:, None]
            w_robust = self.settings.robust_weight * robust.cosines.gather(1, of_class)
            w_clean = self.settings.clean_weight * clean.cosines.gather(1, of_class)
            loss = (
                w_robust * _divergence(on_adv, robust.logits) + w_clean * _divergence(on_clean, clean.logits)
            ).mean()
        with self.clock("student backward"):
            self.optimizer.zero_grad()
            loss.backward()
        with self.clock("optimiser"):
            self.optimizer.step()
        return loss.detach(), adv

    def _attack(self, student: ImageTower, images: Tensor, seeds: Tensor, target: Tensor) -> Tensor:
        """PGD on KL(p_Tc(x) || p_S(x + d)) over the L-inf ball, the student in evaluation mode."""
        student.eval()
        eps, step_size = float(self.attack.eps), float(self.attack.step_size)
        adv = (images + eps * (2 * sample_uniform(seeds, images.shape[1:]) - 1)).clamp(0, 1)
        for _ in range(self.attack.steps):
            adv = adv.detach().requires_grad_(True)
            logits = self.models.student_head(student(adv)).logits
            loss = F.kl_div(logits.log_softmax(-1), target.log_softmax(-1), reduction="sum", log_target=True)
            (gradient,) = torch.autograd.grad(loss, adv)
            delta = (adv.detach() + step_size * gradient.sign() - images).clamp(-eps, eps)
            adv = (images + delta).clamp(0, 1)
        return adv.detach()


def _divergence(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """The terms of KL(p_T || p_S) by sample and class, [B,C]."""
    return F.kl_div(student_logits.log_softmax(-1), teacher_logits.log_softmax(-1), reduction="none", log_target=True)
