"""One micro-batch of distillation: the attack, exactly the passes the method declares, the per-sample loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from . import attacks, methods, objectives
from .config import Attack, Config
from .methods import Head, Pass, Prediction

Forward = Callable[[Tensor], Tensor]


class Student(Protocol):
    """What distillation needs of the engine."""

    def __call__(self, images: Tensor, seeds: Tensor, tokens: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The one forward that is differentiated: V views of B samples, [V*B,3,H,W] and int64 [B] -> embeddings [V*B,D], with patch
        tokens [V*B,P,D] when asked for."""

    def attack_view(self) -> AbstractContextManager[Forward]:
        """The same tower in evaluation mode for input gradients, gathering none for its weights."""


class Teacher(Protocol):
    """What distillation needs of a frozen teacher."""

    head: Head

    def __call__(self, images: Tensor, tokens: bool = False) -> Prediction:
        """The prediction without gradient."""

    def differentiable(self, images: Tensor) -> Prediction:
        """The prediction with its gradient to the images, which `kl_adaptive` asks for."""


class Distillation:
    """The training objective of a configuration: student, head and teachers in; per-sample losses and named terms out.

    `state` is what the method carries from step to step: `end_step` moves it on, a checkpoint keeps it.
    """

    def __init__(self, config: Config, student: Student, head: Head, teachers: dict[str, Teacher]):
        self.method, self.settings = methods.find(config.method.name), config.method
        self.attack = config.attack
        self.objective = objectives.find(config.attack_objective, config.fusion) if config.attack_objective else None
        self.student, self.head, self.teachers = student, head, teachers
        self.passes: set[Pass] = self.method.passes(config.method)
        self.targets: frozenset[Pass] = self.objective.targets if self.objective else frozenset()
        self.state: dict[str, float] = methods.first_state(self.method, config.method)

    def __call__(
        self, images: Tensor, labels: Tensor, seeds: Tensor, stored: Mapping[str, Tensor] = MappingProxyType({})
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """images [B,3,H,W] float32 in [0,1], labels and seeds int64 [B] -> (loss [B], {term: [B]}).

        stored: teacher -> its embeddings [B,D] of these images, read instead of running the teacher on them. The caller runs
        one backward of the loss: there has been one forward of the student that is differentiated.
        """
        views = {"clean": images}
        predictions = self._ask_teachers(views, stored)
        if self.objective:
            views["adv"] = self._adversarial(images, labels, seeds, predictions)
            predictions |= self._ask_teachers({"adv": views["adv"]})
        predictions |= self._ask_student(views, seeds)
        loss, terms = self.method.loss(self.settings, predictions, labels, self.state)
        return loss, {name: term.detach() for name, term in terms.items()}

    def end_step(self, means: dict[str, float]) -> None:
        """Move the method's state on after an update: `means` of the terms over the step's global batch, the same on every rank."""
        self.state = methods.next_state(self.method, self.settings, self.state, means)

    def adversarial(self, images: Tensor, labels: Tensor, seeds: Tensor, stored: Mapping[str, Tensor] = MappingProxyType({})) -> Tensor:
        """The training's adversarial images alone, arguments as in a call."""
        return self._adversarial(images, labels, seeds, self._ask_teachers({"clean": images}, stored))

    def _adversarial(self, images, labels, seeds, predictions) -> Tensor:
        with self.student.attack_view() as forward:
            targets = {p: predictions[p] for p in self.targets if p.model != "student"}
            with torch.no_grad():
                targets |= {p: self.head(forward(images)) for p in self.targets if p.model == "student"}
            maximise = objectives.attack_loss(self.objective, targets, labels, seeds)
            moving = [self.teachers[self.objective.moving]] if self.objective.moving else []
            return perturb(self.attack, lambda x: maximise(self.head(forward(x)), *(t.differentiable(x) for t in moving)), images, seeds)

    def _ask_teachers(self, views: dict[str, Tensor], stored: Mapping[str, Tensor] = MappingProxyType({})) -> dict[Pass, Prediction]:
        predictions = {}
        for p in sorted(self.passes | self.targets):
            if p.model != "student" and p.view in views:
                teacher = self.teachers[p.model]
                # Stored embeddings are of the clean images and come without the patches' tokens.
                read = p.view == "clean" and p.model in stored and not self.settings.tokens
                predictions[p] = teacher.head(stored[p.model]) if read else teacher(views[p.view], **self._tokens)
        return predictions

    def _ask_student(self, views: dict[str, Tensor], seeds: Tensor) -> dict[Pass, Prediction]:
        asked = sorted(p.view for p in self.passes if p.model == "student")
        outputs = self.student(torch.cat([views[v] for v in asked]), seeds, **self._tokens)
        chunks = zip(*(t.chunk(len(asked)) for t in (outputs if self._tokens else (outputs,))))
        return {Pass("student", v): self.head(*chunk) for v, chunk in zip(asked, chunks)}

    @property
    def _tokens(self) -> dict[str, bool]:
        return {"tokens": True} if self.settings.tokens else {}


def perturb(attack: Attack, loss_fn: attacks.LossFn, images: Tensor, seeds: Tensor) -> Tensor:
    """The adversarial images of an `attack` section: maximises `loss_fn(images) -> [B]` inside the ball around `images`.

    With restarts, each sample keeps the images of its largest loss; the first restart's start is that of a single attack.
    """
    shared = dict(norm=attack.norm, eps=float(attack.eps), steps=attack.steps)

    def once(seeds: Tensor | None) -> Tensor:
        if attack.algorithm == "apgd":
            return attacks.apgd(loss_fn, images, seeds=seeds, **shared)
        return attacks.pgd(loss_fn, images, seeds=seeds, step_size=float(attack.step_size), momentum=attack.momentum, **shared)

    if attack.restarts == 1:
        return once(seeds if attack.random_start else None)
    return attacks.worst(loss_fn, (once(attacks.derive_seeds(seeds, r) if r else seeds) for r in range(attack.restarts)))
