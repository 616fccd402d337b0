"""`fare`: unsupervised adversarial fine-tuning of embeddings,

    || z_S(x') - z_T0(x) ||^2,

the embeddings not normalised, no labels; the attack maximises the same distance. Schlarmann et al., "Robust CLIP:
Unsupervised Adversarial Fine-Tuning of Vision Embeddings for Robust Large Vision-Language Models", ICML 2024.
"""

from ...losses import squared_distance
from . import Pass

STUDENT, START = Pass("student", "adv"), Pass("start", "clean")


def passes(settings) -> set[Pass]:
    """The student on x' and the start on x."""
    return {STUDENT, START}


def loss(settings, predictions, labels, state):
    """Squared distance of the embeddings: ([B], terms). Reads no labels."""
    distance = squared_distance(predictions[STUDENT].embeddings, predictions[START].embeddings)
    return distance, {"distance": distance}
