"""`tga_zsr`: text-guided attention kept where the pretrained model had it,

    CE(p_S(x'), y) + a * ||A_S(x') - A_T0(x)|| + b * ||A_S(x) - A_T0(x)||,

the attack on CE. Yu et al., "Text-Guided Attention is All You Need for Zero-Shot Robustness in Vision-Language Models", NeurIPS 2024
(a = .08, b = .05). A(x) [P] is the text-guided attention: the cosine of each patch token with the true class's text
embedding, brought to [0,1] over the image's patches. It stays on the grid of patches, without enlarging it to the image.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses import cross_entropy
from . import Pass, Prediction

ADV, CLEAN, START = Pass("student", "adv"), Pass("student", "clean"), Pass("start", "clean")


def passes(settings) -> set[Pass]:
    return {ADV, CLEAN, START}


def loss(settings, predictions, labels, state):
    kept = attention(predictions[START], labels).detach()
    terms = {
        "ce": cross_entropy(predictions[ADV].logits, labels),
        "attention_adv": torch.linalg.vector_norm(attention(predictions[ADV], labels) - kept, dim=-1),
        "attention_clean": torch.linalg.vector_norm(attention(predictions[CLEAN], labels) - kept, dim=-1),
    }
    return terms["ce"] + settings.alpha * terms["attention_adv"] + settings.beta * terms["attention_clean"], terms


def attention(prediction: Prediction, labels: Tensor) -> Tensor:
    """A(x) of each sample's own class: [B,P] in [0,1]; all 0 where every patch is equally near the text."""
    cosines = torch.einsum("bpd,bd->bp", F.normalize(prediction.tokens, dim=-1), prediction.text[labels])
    low, high = cosines.amin(-1, keepdim=True), cosines.amax(-1, keepdim=True)
    return (cosines - low) / (high - low).clamp_min(1e-12)
