"""`adaad`: adaptive adversarial distillation, whose attack finds where student and teacher part,

    a * KL(p_T(x') || p_S(x')) + (1 - a) * KL(p_T(x) || p_S(x)),      x' = argmax KL(p_T(x') || p_S(x')),

with the attack's gradient through the teacher too; no labels. Huang et al., "Boosting Accuracy and Robustness of
Student Models via Adaptive Adversarial Distillation", CVPR 2023 (a = 1).
"""

from ...losses import kl
from . import Pass


def passes(settings) -> set[Pass]:
    """Student and robust teacher on both images, where their terms have weight."""
    views = ["adv"] * (settings.alpha > 0) + ["clean"] * (settings.alpha < 1)
    return {Pass(model, view) for view in views for model in ("student", "robust")}


def loss(settings, predictions, labels, state):
    """a * KL on x' + (1 - a) * KL on x: ([B], terms). Reads no labels."""
    weights = {"adv": settings.alpha, "clean": 1 - settings.alpha}
    terms = {
        f"kl_{view}": kl(predictions["robust", view].logits, predictions["student", view].logits)
        for view in weights
        if weights[view]
    }
    return sum(weights[view] * terms[f"kl_{view}"] for view in weights if weights[view]), terms
