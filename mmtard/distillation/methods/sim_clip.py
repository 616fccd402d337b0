"""`sim_clip`: unsupervised adversarial fine-tuning by the direction of embeddings,

    - cos(z_S(x'), z_T0(x)),

no labels; the attack maximises || z_S(x') - z_T0(x) ||^2. Hossain & Imteaj, "Sim-CLIP: Unsupervised Siamese
Adversarial Fine-Tuning for Robust and Semantically-Rich Vision-Language Models", arXiv 2407.14971. The clean branch
is T0, to which no gradient flows. The public code adds the same cosine with the gradient of z_S(x') stopped: a term
without any gradient, which is left out here.
"""

import torch.nn.functional as F

from . import Pass

STUDENT, START = Pass("student", "adv"), Pass("start", "clean")


def passes(settings) -> set[Pass]:
    """The student on x' and the start on x."""
    return {STUDENT, START}


def loss(settings, predictions, labels, state):
    """Minus the cosine of the embeddings: ([B], terms). Reads no labels."""
    cosine = F.cosine_similarity(predictions[STUDENT].embeddings, predictions[START].embeddings.detach(), dim=-1)
    return -cosine, {"cosine": cosine}
