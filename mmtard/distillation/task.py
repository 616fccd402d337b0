"""One micro-batch of distillation: the attack, exactly the passes the method declares, the per-sample loss."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from ..config import Config
from ..zero_shot import Prediction, ZeroShotHead
from . import attack_objectives, methods
from .accuracy import batch_hits
from .added_terms import added_loss, run_passes
from .learned import LearnedParts
from .methods import Pass
from .training_attack import Forward, perturb


class StudentModel(Protocol):
    """What distillation needs of the engine."""

    def __call__(self, images: Tensor, seeds: Tensor, tokens: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The one forward that is differentiated: V groups of B samples, [V*B,3,H,W] and int64 [B] -> embeddings
        [V*B,D], with patch tokens [V*B,P,D] when asked for.
        """

    def attack_forward(self) -> AbstractContextManager[Forward]:
        """The same tower in evaluation mode for input gradients, gathering none for its weights."""


class TeacherModel(Protocol):
    """What distillation needs of a frozen teacher."""

    head: ZeroShotHead

    def __call__(self, images: Tensor, tokens: bool = False) -> Prediction:
        """The prediction without gradient."""

    def differentiable(self, images: Tensor) -> Prediction:
        """The prediction with its gradient to the images, which `kl_adaptive` asks for."""


class DistillationTask:
    """The training objective of a configuration: student, head and teachers in; per-sample losses and named terms out.

    `state` is what the method carries from step to step: `end_step` moves it on, a checkpoint keeps it. `attack` is
    that of the update under way, which `begin_step` sets; `fell_back`: the alarm went off, so that it has more steps.
    `learned` are the small modules of the added terms, which the caller updates after each update of the student.
    """

    def __init__(
        self,
        config: Config,
        student: StudentModel,
        head: ZeroShotHead,
        teachers: dict[str, TeacherModel],
        learned: LearnedParts | None = None,
    ):
        self.config = config
        self.method, self.settings = methods.find_method(config.method.name), config.method
        self.attack, self.fell_back = config.attack.at(0), False
        self.objective = (
            attack_objectives.find_objective(config.attack_objective, config.fusion, config.attack_sharpness)
            if config.attack_objective
            else None
        )
        self.student, self.head, self.teachers = student, head, teachers
        self.learned = learned or LearnedParts()
        self.passes: set[Pass] = run_passes(config)
        self.token_models = config.token_models
        self.reference_passes: frozenset[Pass] = self.objective.reference_passes if self.objective else frozenset()
        self.state: dict[str, float] = methods.first_state(self.method, config.method)

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        seeds: Tensor,
        stored: Mapping[str, Tensor] = MappingProxyType({}),
        samples: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """images [B,3,H,W] float32 in [0,1], labels and seeds int64 [B] -> (loss [B], {term: [B]}).

        stored: teacher -> its embeddings [B,D] of these images, read instead of running the teacher on them.
        samples: int64 [B], which of the data these are; read for multipliers of the samples' own alone. The caller runs
        one backward of the loss: there has been one forward of the student that is differentiated.
        """
        inputs = {"clean": images}
        predictions = self._teacher_predictions(inputs, stored)
        if self.objective:
            inputs["adv"] = self._adversarial(images, labels, seeds, predictions)
            predictions |= self._teacher_predictions({"adv": inputs["adv"]})
        predictions |= self._student_predictions(inputs, seeds)
        loss, terms = self.method.loss(self.settings, predictions, labels, self.state)
        added, added_terms = added_loss(self.config, predictions, self.learned, self._on_device(samples, images))
        detached = {name: term.detach() for name, term in (terms | added_terms).items()}
        return loss + added, detached | batch_hits(predictions, labels)

    def _on_device(self, samples: Tensor | None, images: Tensor) -> Tensor | None:
        """The samples where the multipliers lie: they are on the CPU, and copied for who needs them alone."""
        return None if samples is None or self.learned.samples is None else samples.to(images.device, non_blocking=True)

    def begin_step(self, update: int) -> None:
        """Take the attack of update `update` (0-based): its ramp, and the fall back after an alarm."""
        self.attack = self.config.attack.at(update, self.fell_back)

    def end_step(self, means: dict[str, float]) -> None:
        """Move the method's state on after an update.

        means: of the terms over the step's global batch, and quantiles of some (`w_NAME_p50`); the same on every rank.
        """
        self.state = methods.next_state(self.method, self.settings, self.state, means)

    def adversarial(
        self, images: Tensor, labels: Tensor, seeds: Tensor, stored: Mapping[str, Tensor] = MappingProxyType({})
    ) -> Tensor:
        """The training's adversarial images alone, arguments as in a call."""
        return self._adversarial(images, labels, seeds, self._teacher_predictions({"clean": images}, stored))

    def _adversarial(self, images, labels, seeds, predictions) -> Tensor:
        with self.student.attack_forward() as forward:
            targets = {p: predictions[p] for p in self.reference_passes if p.model != "student"}
            with torch.no_grad():
                targets |= {p: self.head(forward(images)) for p in self.reference_passes if p.model == "student"}
            maximise = attack_objectives.attack_loss(self.objective, targets, labels, seeds)
            moving = [self.teachers[self.objective.through_teacher]] if self.objective.through_teacher else []
            return perturb(
                self.attack,
                lambda x: maximise(self.head(forward(x)), *(t.differentiable(x) for t in moving)),
                images,
                seeds,
            )

    def _teacher_predictions(
        self, inputs: dict[str, Tensor], stored: Mapping[str, Tensor] = MappingProxyType({})
    ) -> dict[Pass, Prediction]:
        predictions = {}
        for p in sorted(self.passes | self.reference_passes):
            if p.model != "student" and p.image in inputs:
                teacher = self.teachers[p.model]
                # Stored embeddings are of the clean images and come without the patches' tokens.
                read = p.image == "clean" and p.model in stored and p.model not in self.token_models
                predictions[p] = (
                    teacher.head(stored[p.model]) if read else teacher(inputs[p.image], **self._tokens(p.model))
                )
        return predictions

    def _student_predictions(self, inputs: dict[str, Tensor], seeds: Tensor) -> dict[Pass, Prediction]:
        asked = sorted(p.image for p in self.passes if p.model == "student")
        tokens = self._tokens("student")
        outputs = self.student(torch.cat([inputs[image] for image in asked]), seeds, **tokens)
        chunks = zip(*(t.chunk(len(asked)) for t in (outputs if tokens else (outputs,))))
        return {Pass("student", image): self.head(*chunk) for image, chunk in zip(asked, chunks)}

    def _tokens(self, model: str) -> dict[str, bool]:
        return {"tokens": True} if model in self.token_models else {}
