"""`tecoa`: text-guided contrastive adversarial training, CE(p_S(x'), y) with x' maximising the same CE.

Mao et al., "Understanding Zero-Shot Adversarial Robustness for Large-Scale Models", ICLR 2023.
"""

from ...losses import cross_entropy
from . import Pass

STUDENT = Pass("student", "adv")


def passes(settings) -> set[Pass]:
    """The student on x' alone."""
    return {STUDENT}


def loss(settings, predictions, labels, state):
    """Cross-entropy on x': ([B], terms)."""
    ce = cross_entropy(predictions[STUDENT].logits, labels)
    return ce, {"ce": ce}
