"""The training step without one of the things that make it fast, so that a table can say what each buys."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..config import Config
from ..distillation.task import DistillationTask
from ..models.image_tower import ImageTower
from ..models.student import checkpoint_activations
from ..models.vision_transformer import lighten, restore
from .models import ResidentParts


def towers(parts: ResidentParts) -> list[ImageTower]:
    """Every tower that a step of mmtard runs."""
    copy = [parts.engine.attack_copy.tower] if parts.engine.attack_copy else []
    return [parts.engine.ds.module, *copy, *(teacher.tower for teacher in parts.teachers.values())]


@contextmanager
def without_attack_copy(parts: ResidentParts) -> Iterator[None]:
    """Attack the trained tower itself."""
    copy, parts.engine.attack_copy = parts.engine.attack_copy, None
    try:
        yield
    finally:
        parts.engine.attack_copy = copy


@contextmanager
def as_open_clip(parts: ResidentParts) -> Iterator[None]:
    """Compute ViTs as open_clip does, uncompiled."""
    with uncompiled(parts):
        for tower in towers(parts):
            restore(tower.visual)
        try:
            yield
        finally:
            for tower in towers(parts):
                lighten(tower.visual)


@contextmanager
def uncompiled(parts: ResidentParts) -> Iterator[None]:
    """Run no compiled graph."""
    graphs = [(tower, tower.graph) for tower in towers(parts)]
    for tower, _ in graphs:
        tower.graph = None
    try:
        yield
    finally:
        for tower, graph in graphs:
            tower.graph = graph


@contextmanager
def recomputing(parts: ResidentParts) -> Iterator[None]:
    """Compute the blocks' activations a second time in the attack, as `engine.checkpoint_attack` does."""
    engine = parts.engine
    copy, engine.checkpoint_attack = engine.attack_copy, True
    if copy:
        checkpoint_activations(copy.tower)
    try:
        yield
    finally:
        engine.checkpoint_attack = False
        if copy:
            checkpoint_activations(copy.tower, False)


def one_noisy_step(config: Config, parts: ResidentParts) -> DistillationTask | None:
    """The step whose attack is N-FGSM. None where there is no attack, or that one already, or one in L2."""
    attack = config.attack
    if not config.attack_objective or attack.algorithm == "nfgsm" or attack.norm != "linf":
        return None
    own = {"algorithm": "nfgsm", "steps": 1, "step_size": None, "restarts": 1, "random_start": True, "ramp": None}
    changed = config.model_copy(update={"attack": attack.model_copy(update=own)})
    return DistillationTask(changed, parts.engine, parts.heads["student"], parts.teachers, parts.task.learned)


def every_target_stored(config: Config, parts: ResidentParts) -> DistillationTask | None:
    """The step whose teachers all see clean images, those of the adversarial image for its sake (`clean_for_adv`).

    None where the method has no teacher of the adversarial image, or none of the clean one.
    """
    method = config.method
    if method.name != "mmtard" or set(method.views.values()) != {"adv", "clean"}:
        return None
    views = {name: "clean_for_adv" if view == "adv" else view for name, view in method.views.items()}
    changed = config.model_copy(update={"method": method.model_copy(update={"views": views})})
    return DistillationTask(changed, parts.engine, parts.heads["student"], parts.teachers, parts.task.learned)
