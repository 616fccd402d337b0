"""One micro-batch of distillation: the attack, exactly the passes the method declares, the per-sample loss."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from . import attacks, methods, objectives
from .config import Attack, Config
from .methods import Head, Pass, Prediction

Forward = Callable[[Tensor], Tensor]


class Student(Protocol):
    """What distillation needs of the engine."""

    def __call__(self, images: Tensor, seeds: Tensor) -> Tensor:
        """The one forward that is differentiated: V views of B samples, [V*B,3,H,W] and int64 [B] -> embeddings [V*B,D]."""

    def attack_view(self) -> AbstractContextManager[Forward]:
        """The same tower in evaluation mode for input gradients, gathering none for its weights."""


class Distillation:
    """The training objective of a configuration: student, head and teachers in; per-sample losses and named terms out."""

    def __init__(self, config: Config, student: Student, head: Head, teachers: dict[str, Callable[[Tensor], Prediction]]):
        self.method, self.settings = methods.find(config.method.name), config.method
        self.attack, self.objective = config.attack, config.attack_objective
        self.student, self.head, self.teachers = student, head, teachers
        self.passes: set[Pass] = self.method.passes(config.method)
        self.target = objectives.target_pass(self.objective) if self.objective else None

    def __call__(self, images: Tensor, labels: Tensor, seeds: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """images [B,3,H,W] float32 in [0,1], labels and seeds int64 [B] -> (loss [B], {term: [B]}).

        The caller runs one backward of the loss: there has been one forward of the student that is differentiated.
        """
        views = {"clean": images}
        predictions = self._ask_teachers(views)
        if self.objective:
            views["adv"] = self._adversarial(images, labels, seeds, predictions)
            predictions |= self._ask_teachers({"adv": views["adv"]})
        predictions |= self._ask_student(views, seeds)
        loss, terms = self.method.loss(self.settings, predictions, labels)
        return loss, {name: term.detach() for name, term in terms.items()}

    def adversarial(self, images: Tensor, labels: Tensor, seeds: Tensor) -> Tensor:
        """The training's adversarial images alone, arguments as in a call."""
        return self._adversarial(images, labels, seeds, self._ask_teachers({"clean": images}))

    def _adversarial(self, images, labels, seeds, predictions) -> Tensor:
        with self.student.attack_view() as forward:
            if self.target == Pass("student", "clean"):
                with torch.no_grad():
                    predictions = {self.target: self.head(forward(images))}
            maximise = objectives.attack_loss(self.objective, predictions[self.target] if self.target else None, labels)
            return perturb(self.attack, lambda x: maximise(self.head(forward(x))), images, seeds)

    def _ask_teachers(self, views: dict[str, Tensor]) -> dict[Pass, Prediction]:
        wanted = (self.passes | {self.target}) - {None}
        return {p: self.teachers[p.model](views[p.view]) for p in sorted(wanted) if p.model != "student" and p.view in views}

    def _ask_student(self, views: dict[str, Tensor], seeds: Tensor) -> dict[Pass, Prediction]:
        asked = sorted(p.view for p in self.passes if p.model == "student")
        embeddings = self.student(torch.cat([views[v] for v in asked]), seeds).chunk(len(asked))
        return {Pass("student", v): self.head(z) for v, z in zip(asked, embeddings)}


def perturb(attack: Attack, loss_fn: attacks.LossFn, images: Tensor, seeds: Tensor) -> Tensor:
    """The adversarial images of an `attack` section: maximises `loss_fn(images) -> [B]` inside the ball around `images`."""
    seeds = seeds if attack.random_start else None
    shared = dict(norm=attack.norm, eps=float(attack.eps), steps=attack.steps, seeds=seeds)
    if attack.algorithm == "apgd":
        return attacks.apgd(loss_fn, images, **shared)
    return attacks.pgd(loss_fn, images, step_size=float(attack.step_size), momentum=attack.momentum, **shared)
