"""`pmg_aft`: pre-trained model guided adversarial fine-tuning,

    CE(p_S(x'), y) + a * KL(p_T0(x') || p_S(x')) + b * KL(p_S(x) || p_S(x')),

the attack on CE. Wang et al., "Pre-trained Model Guided Fine-Tuning for Zero-Shot Adversarial Robustness", CVPR 2024
(a = b = 1). The public code normalises text features that carry the logit scale and so drops the scale from the KL
terms; here every p is softmax(s <z, t>), as in the paper. The gradient of the last term flows through both of its
images.
"""

from ...losses import cross_entropy, kl
from . import Pass

ADV, CLEAN, START = Pass("student", "adv"), Pass("student", "clean"), Pass("start", "adv")


def passes(settings) -> set[Pass]:
    """The student on x' and x, and the start on x'."""
    return {ADV, CLEAN, START}


def loss(settings, predictions, labels, state):
    """Cross-entropy, the start's term and the student's own: ([B], terms)."""
    adv = predictions[ADV].logits
    terms = {
        "ce": cross_entropy(adv, labels),
        "kl_start": kl(predictions[START].logits, adv),
        "kl_self": kl(predictions[CLEAN].logits, adv),
    }
    return terms["ce"] + settings.general_weight * terms["kl_start"] + settings.clean_weight * terms["kl_self"], terms
