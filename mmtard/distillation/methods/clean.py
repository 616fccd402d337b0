"""`clean`: cross-entropy on clean images, CE(s <z_S(x), t>, y). The usual way to fine-tune a clean teacher."""

from ...losses import cross_entropy
from . import Pass

STUDENT = Pass("student", "clean")


def passes(settings) -> set[Pass]:
    """The student on x alone."""
    return {STUDENT}


def loss(settings, predictions, labels, state):
    """Cross-entropy on x: ([B], terms)."""
    ce = cross_entropy(predictions[STUDENT].logits, labels)
    return ce, {"ce": ce}
