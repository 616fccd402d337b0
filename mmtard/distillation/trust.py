"""What the teachers of the adversarial image teach as far as they can be trusted: a part w of each one's target p goes
to another source q,

    target_i = (1 - w_i) p_i + w_i q_i,

all of it without gradient. `label`, ours: q = 1_y and w = 1 - p[y]. `clean`, ours, without labels: q is the mean
prediction of the teachers of the clean image and w = 1 - <q, p>, which is the same for a q that is sure of y.
`uncertainty`, without labels: q is the class that the student itself finds in x', one-hot, and w = H(p) / (H(p) +
kappa), kappa the median of the teacher's entropies H; Dong et al., "Robust SuperAlignment: Weak-to-Strong Robustness
Generalization for Vision-Language Models" (Adv-W2S), NeurIPS 2025, equations 6 and 13. There kappa is the median over
the data set; here it follows the medians of the global batches, and the first step trusts the teacher. Their inverse
adversarial examples, which refine the teacher, are left out: each takes an attack through the teacher at every step, so
that no teacher could be stored.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ENTROPY = "entropy_"  # the term of a teacher's entropies, and what the state calls their median
FOLLOW = 0.1  # how far a batch's median moves kappa
LEAST_KAPPA = 1e-6  # nats: below it a teacher is as sure as float32 can say


@torch.no_grad()
def log_targets(
    settings, teachers, students, labels: Tensor, state: dict[str, float]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """({teacher: log target [B,C]}, named terms [B]) of the teachers whose targets are mixed; none where all are whole.

    teachers, students: name -> Prediction on the image that the teacher sees, and that it teaches.
    """
    if settings.trust == "whole":
        return {}, {}
    targets, terms = {}, {}
    for name in (name for name, view in settings.views.items() if view != "clean"):
        log_p = log_probabilities(settings, name, teachers[name].logits)
        if settings.trust == "uncertainty":
            entropy = -(log_p.exp() * log_p).sum(-1)
            w = uncertainty_weight(entropy, state.get(f"{ENTROPY}{name}"))
            terms[f"{ENTROPY}{name}"] = entropy
            log_q = one_hot(students[name].logits.argmax(-1), log_p)
            targets[name] = mix(log_p, log_q, torch.log1p(-w), w.log())
        else:
            log_q = one_hot(labels, log_p) if settings.trust == "label" else _of_clean(settings, teachers)
            log_agreement = (log_p + log_q).logsumexp(-1).clamp(max=0)
            w = 1 - log_agreement.exp()
            targets[name] = mix(log_p, log_q, log_agreement, w.log())
        terms[f"w_handed_{name}"] = w
    return targets, terms


def log_probabilities(settings, name: str, logits: Tensor) -> Tensor:
    """The log of a teacher's prediction at its temperature: logits [B,C] -> [B,C]."""
    return F.log_softmax(logits / settings.temperatures.get(name, 1.0), dim=-1)


def one_hot(classes: Tensor, like: Tensor) -> Tensor:
    """The log of 1_y: 0 at each sample's class and -inf elsewhere; classes int64 [B], like [B,C] -> [B,C]."""
    return torch.full_like(like, -torch.inf).scatter(1, classes[:, None], 0.0)


def mix(log_p: Tensor, log_q: Tensor, log_keep: Tensor, log_hand: Tensor) -> Tensor:
    """log(keep * p + hand * q) of each sample: [B,C] x2, [B] x2 -> [B,C]."""
    return torch.logaddexp(log_keep[:, None] + log_p, log_hand[:, None] + log_q)


def uncertainty_weight(entropy: Tensor, kappa: float | None) -> Tensor:
    """w = H / (H + kappa) of entropies [B] >= 0; 0 before a median is known."""
    if kappa is None:
        return torch.zeros_like(entropy)
    return entropy / (entropy + max(kappa, LEAST_KAPPA))


def next_medians(settings, state: dict[str, float], numbers: dict[str, float]) -> dict[str, float]:
    """The state after a step over whose global batch the entropies had these medians (`entropy_NAME_p50`)."""
    moved = {}
    for key in (f"{ENTROPY}{name}" for name, view in settings.views.items() if view != "clean"):
        median = numbers[f"{key}_p50"]
        moved[key] = median if key not in state else state[key] + FOLLOW * (median - state[key])
    return state | moved


def _of_clean(settings, teachers) -> Tensor:
    clean = [
        log_probabilities(settings, name, teachers[name].logits)
        for name, view in settings.views.items()
        if view == "clean"
    ]
    return torch.stack(clean).logsumexp(0) - math.log(len(clean))
