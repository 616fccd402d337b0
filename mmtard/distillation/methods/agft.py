"""`agft`: alignment-guided fine-tuning, towards the pretrained model's softened prediction on the clean image,

    CE(softmax(gamma * r * l_T0(x)), softmax(r * l_S(x'))),      l = s <z, t>,

no labels; the attack maximises the same. Cui et al., "AGFT: Alignment-Guided Fine-Tuning for Zero-Shot Adversarial
Robustness of Vision-Language Models", CVPR 2026, with gamma = .4 and a logit scale of 180, which `sharpness` r = 1.8
makes of CLIP's s = 100. Its public code does the same.
"""

import torch.nn.functional as F

from . import Pass

STUDENT, START = Pass("student", "adv"), Pass("start", "clean")


def passes(settings) -> set[Pass]:
    """The student on x' and the start on x."""
    return {STUDENT, START}


def loss(settings, predictions, labels, state):
    """Cross-entropy to the start's softened prediction: ([B], terms). Reads no labels."""
    target = F.softmax(settings.gamma * settings.sharpness * predictions[START].logits.detach(), dim=-1)
    ce = -(target * F.log_softmax(settings.sharpness * predictions[STUDENT].logits, dim=-1)).sum(-1)
    return ce, {"ce": ce}
