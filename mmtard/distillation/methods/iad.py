"""`iad`: introspective adversarial distillation, which trusts the teacher as far as it withstands the student's attack,

    KL(p_T(x) || p_S(x')) + (1 - p_T(y | x')^b) * KL(p_S(x) || p_S(x')),

the attack on CE. Zhu et al., "Reliable Adversarial Distillation with Unreliable Teachers", ICLR 2022 (b = .1). The
last KL's gradient flows through both images, none through the teacher's confidence. Both terms count from the first
step; the public code adds the second after a number of epochs.
"""

from ...losses import kl, true_class
from . import Pass

ADV, CLEAN = Pass("student", "adv"), Pass("student", "clean")
TEACHER, TEACHER_ADV = Pass("robust", "clean"), Pass("robust", "adv")


def passes(settings) -> set[Pass]:
    """Student and robust teacher, each on x and on x'."""
    return {ADV, CLEAN, TEACHER, TEACHER_ADV}


def loss(settings, predictions, labels, state):
    """The teacher's and the student's own distribution, by the teacher's trust: ([B], terms)."""
    adv = predictions[ADV].logits
    trust = true_class(predictions[TEACHER_ADV].logits.softmax(-1), labels).detach() ** settings.beta
    terms = {"kl_robust": kl(predictions[TEACHER].logits, adv), "kl_self": kl(predictions[CLEAN].logits, adv)}
    return terms["kl_robust"] + (1 - trust) * terms["kl_self"], terms | {"w_self": 1 - trust}
