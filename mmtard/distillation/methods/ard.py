"""`ard`: single-teacher adversarially robust distillation,

    a * T^2 * KL(p_Tr^T(x) || p_S^T(x')) + (1 - a) * CE(p_S(x), y),      p^T = softmax(logits / T).

Goldblum et al., "Adversarially Robust Distillation", AAAI 2020 (a = 1, T = 30, attack on CE). With `temperature: 1`,
`attack.objective: kl_robust` it is the single-teacher predecessor of MMT-ARD.
"""

from ...losses import cross_entropy, kl
from . import Pass


def passes(settings) -> set[Pass]:
    """The student on x', the robust teacher on its view, and the student on x where cross-entropy has weight."""
    student_clean = {Pass("student", "clean")} if settings.alpha < 1 else set()
    return {Pass("student", "adv"), Pass("robust", settings.teacher_view)} | student_clean


def loss(settings, predictions, labels, state):
    """The teacher's softened distribution against cross-entropy: ([B], terms)."""
    a, T = settings.alpha, settings.temperature
    teacher, student = predictions["robust", settings.teacher_view], predictions["student", "adv"]
    terms = {"kl_robust": T**2 * kl(teacher.logits, student.logits, T)}
    total = a * terms["kl_robust"]
    if a < 1:
        terms["ce"] = cross_entropy(predictions["student", "clean"].logits, labels)
        total = total + (1 - a) * terms["ce"]
    return total, terms
