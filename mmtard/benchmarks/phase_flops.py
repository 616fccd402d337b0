"""FLOPs of a training step by its phases."""

from __future__ import annotations

from ..config import Attack
from ..distillation.attack_objectives import Objective
from ..distillation.methods import Pass
from ..training.throughput import sample_flops

COMPUTE = ("teachers", "attack", "student")  # the phases that compute


def phase_flops(
    forward: dict[str, float], passes: set[Pass], objective: Objective | None, attack: Attack, adapters: bool
) -> dict[str, float]:
    """FLOPs of training on one sample, by the phases of COMPUTE; arguments and sum as of `sample_flops`.

    forward: of a model that does not run, 0.
    """
    asked = {*passes, *(objective.reference_passes if objective else ())}
    student_alone = dict.fromkeys(forward, 0.0) | {"student": forward["student"]}
    flops = {
        "teachers": float(sum(forward[p.model] for p in asked if p.model != "student")),
        "student": sample_flops(student_alone, passes, None, attack, adapters),
    }
    flops["attack"] = sample_flops(forward, passes, objective, attack, adapters) - sum(flops.values())
    return {phase: flops[phase] for phase in COMPUTE}
