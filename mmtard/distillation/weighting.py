"""Weights of the teachers in multi-teacher distillation, for each sample and each of any number of teachers.

A weighting is a function of the settings, the teachers' `Prediction`s on the images they see (name -> Prediction),
the labels, and the state carried from step to step; it returns name -> weight [B] and is called without gradient.
`mmtard.config.WEIGHTINGS` names them and says which read labels; `FUNCTIONS` has the function of each. All but
`official`, its factors alone, and `mtard` are ours, where the paper has words or nothing. A teacher that sees the clean
image and teaches the adversarial one (`clean_for_adv`) is judged by what it sees and counts as one of the adversarial
image.
"""

import math

import torch
from torch import Tensor

from ..config import WEIGHTINGS
from ..errors import unknown_name
from ..losses import true_class


def uniform(settings, teachers, labels, state) -> dict[str, Tensor]:
    """The same weight for every teacher and sample, budget / M each."""
    return {name: torch.full_like(t.logits[:, 0], settings.budget / len(teachers)) for name, t in teachers.items()}


def official(settings, teachers, labels, state) -> dict[str, Tensor]:
    """The weights of the published MMT-ARD code: factor times the raw cosine to the true class.

    w^m_i = robust_weight * <z_m(x'_i), t_{y_i}> for a teacher that sees the adversarial image, clean_weight *
    <z_m(x_i), t_{y_i}> for one that sees the clean image (50 and 5 in the published recipe, which has one of each). A
    cosine can be negative, and its weight then pushes the student away from that teacher: that is the recipe.
    """
    factors = _factors(settings)
    return {name: factors[settings.views[name]] * true_class(t.cosines, labels) for name, t in teachers.items()}


def constant(settings, teachers, labels, state) -> dict[str, Tensor]:
    """The factors of `official` alone, the same for every sample: robust_weight or clean_weight by the image a
    teacher sees.
    """
    factors = _factors(settings)
    return {name: torch.full_like(t.logits[:, 0], factors[settings.views[name]]) for name, t in teachers.items()}


def confidence_sigmoid(settings, teachers, labels, state) -> dict[str, Tensor]:
    """Ours: a fixed budget split by which teacher is surer of the true class.

    w^m_i = budget * softmax_m(slope * p_m[y_i] + bias * [m sees x']). For a robust and a clean teacher that is
    w^r_i = budget * sigmoid(slope * (p_Tr(x'_i)[y_i] - p_Tc(x_i)[y_i]) + bias) and w^c_i = budget - w^r_i.
    """
    return _split(settings, {name: true_class(t.logits.softmax(-1), labels) for name, t in teachers.items()})


def entropy(settings, teachers, labels, state) -> dict[str, Tensor]:
    """Ours, without labels: as `confidence_sigmoid`, with confidence 1 - H(p_m) / log C in place of p_m[y_i]."""
    entropies = {name: torch.special.entr(t.logits.softmax(-1)).sum(-1) for name, t in teachers.items()}
    confidence = {name: 1 - h / math.log(max(2, teachers[name].logits.shape[-1])) for name, h in entropies.items()}
    return _split(settings, confidence)


def hardness(settings, teachers, labels, state) -> dict[str, Tensor]:
    """Ours: a sample weighs more the less the teachers of the adversarial image are sure of its true class.

    w^m_i = budget / M * (1 + slope * (1 - c_i)), c_i the mean of p_m(x'_i)[y_i] over the teachers that see x'; over all
    teachers where none does. The teachers of a sample weigh alike.
    """
    robust = [name for name in teachers if settings.views[name] != "clean"] or list(teachers)
    c = torch.stack([true_class(teachers[name].logits.softmax(-1), labels) for name in robust]).mean(0)
    return dict.fromkeys(teachers, settings.budget / len(teachers) * (1 + settings.slope * (1 - c)))


def mtard(settings, teachers, labels, state) -> dict[str, Tensor]:
    """MTARD's loss balancing (Zhao et al., ECCV 2022): budget * w_m of the state, the same for every sample."""
    return {name: torch.full_like(t.logits[:, 0], settings.budget * state[f"w_{name}"]) for name, t in teachers.items()}


def _factors(settings) -> dict[str, float]:
    return {"adv": settings.robust_weight, "clean_for_adv": settings.robust_weight, "clean": settings.clean_weight}


def _split(settings, confidence: dict[str, Tensor]) -> dict[str, Tensor]:
    scores = [settings.slope * c + settings.bias * (settings.views[name] != "clean") for name, c in confidence.items()]
    return dict(zip(confidence, settings.budget * torch.stack(scores).softmax(0)))


FUNCTIONS = {
    "uniform": uniform,
    "official": official,
    "constant": constant,
    "confidence_sigmoid": confidence_sigmoid,
    "hardness": hardness,
    "entropy": entropy,
    "mtard": mtard,
}


def teacher_weights(settings, teachers, labels: Tensor, state: dict[str, float]) -> dict[str, Tensor]:
    """Name -> weight [B] of each teacher by `settings.weighting`; no gradient."""
    if settings.weighting not in WEIGHTINGS:
        raise unknown_name("weighting", settings.weighting, WEIGHTINGS)
    with torch.no_grad():
        return FUNCTIONS[settings.weighting](settings, teachers, labels, state)


# ---------------------------------------------------------------- loss balancing


def balanced_start(teachers) -> dict[str, float]:
    """The state of loss balancing before the first step: equal weights of sum 1."""
    return {f"w_{name}": 1 / len(teachers) for name in teachers}


def balanced_next(rate: float, state: dict[str, float], losses: dict[str, float]) -> dict[str, float]:
    """The state after a step whose mean losses over the global batch were `losses` (teacher -> L_m).

    MTARD, adaptive normalisation: with L_m(0) the first step's loss and r_m = (L_m / L_m(0)) / sum_n (L_n / L_n(0)),
    w_m <- rate * r_m + (1 - rate) * w_m. Here the weights follow the step before, whose losses are known on all
    ranks; there they follow the step itself. A teacher whose first loss was 0 has nothing to teach and keeps r_m = 0.
    """
    first = {name: state.get(f"first_{name}", loss) for name, loss in losses.items()}
    relative = {name: loss / first[name] if first[name] > 0 else 0.0 for name, loss in losses.items()}
    total = sum(relative.values())
    weights = {
        name: rate * relative[name] / total + (1 - rate) * state[f"w_{name}"] if total > 0 else state[f"w_{name}"]
        for name in losses
    }
    return {f"w_{name}": w for name, w in weights.items()} | {f"first_{name}": value for name, value in first.items()}
