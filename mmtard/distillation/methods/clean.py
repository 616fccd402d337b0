"""`clean`: cross-entropy on clean images, CE(s <z_S(x), t>, y). The usual way to fine-tune a clean teacher."""

from ...losses import cross_entropy
from . import Pass

STUDENT = Pass("student", "clean")


def passes(settings) -> set[Pass]:
    return {STUDENT}


def loss(settings, predictions, labels, state):
    ce = cross_entropy(predictions[STUDENT].logits, labels)
    return ce, {"ce": ce}
