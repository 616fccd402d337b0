"""`trades`: a surrogate of robust error traded against clean error,

    CE(p_S(x), y) + b * KL(p_S(x) || p_S(x')),

the attack on the KL. Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy", ICML 2019 (b
= 6). The KL's gradient flows through both images.
"""

from ...losses import cross_entropy, kl
from . import Pass

CLEAN, ADV = Pass("student", "clean"), Pass("student", "adv")


def passes(settings) -> set[Pass]:
    """The student on x and x'."""
    return {CLEAN, ADV}


def loss(settings, predictions, labels, state):
    """Cross-entropy on x and the KL to x': ([B], terms)."""
    clean = predictions[CLEAN].logits
    terms = {"ce": cross_entropy(clean, labels), "kl_self": kl(clean, predictions[ADV].logits)}
    return terms["ce"] + settings.beta * terms["kl_self"], terms
