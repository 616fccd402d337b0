"""`rslad`: robust soft label adversarial distillation,

    a * KL(p_T(x) || p_S(x')) + (1 - a) * KL(p_T(x) || p_S(x)),

the attack on the first term; no labels. Zi et al., "Revisiting Adversarial Robustness Distillation: Robust Soft
Labels Make Student Better", ICCV 2021 (a = 5/6).
"""

from ...losses import kl
from . import Pass

ADV, CLEAN, TEACHER = Pass("student", "adv"), Pass("student", "clean"), Pass("robust", "clean")


def passes(settings) -> set[Pass]:
    """The student on x' and x, and the robust teacher on x."""
    return {ADV, CLEAN, TEACHER}


def loss(settings, predictions, labels, state):
    """The teacher's soft labels for both images: ([B], terms). Reads no labels."""
    target = predictions[TEACHER].logits
    terms = {"kl_adv": kl(target, predictions[ADV].logits), "kl_clean": kl(target, predictions[CLEAN].logits)}
    return settings.alpha * terms["kl_adv"] + (1 - settings.alpha) * terms["kl_clean"], terms
