"""`tga_zsr`: text-guided attention kept where the pretrained model had it,

    CE(p_S(x'), y) + a * dist(A_S(x'), A_T0(x)) + b * dist(A_S(x), A_T0(x)),      dist(A, B) = sqrt(||A - B||^2 + 1e-6),

the attack on CE. Yu et al., "Text-Guided Attention is All You Need for Zero-Shot Robustness in Vision-Language
Models", NeurIPS 2024 (a = .08, b = .05). A(x) [P] is the text-guided attention: the cosine of each patch token with
the true class's text embedding, brought to [0,1] over the image's patches. It stays on the grid of patches, without
enlarging it to the image. The paper's distance is the L2 norm itself; but the student starts as T0, and a norm's
gradient near 0 is rounding noise brought to length 1, which is another at every batch size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...losses import cross_entropy, squared_distance
from ...zero_shot import Prediction
from . import Pass

ADV, CLEAN, START = Pass("student", "adv"), Pass("student", "clean"), Pass("start", "clean")


def passes(settings) -> set[Pass]:
    """The student on x' and x, and the start on x."""
    return {ADV, CLEAN, START}


def loss(settings, predictions, labels, state):
    """Cross-entropy and the two distances of attention: ([B], terms)."""
    kept = attention(predictions[START], labels).detach()
    terms = {
        "ce": cross_entropy(predictions[ADV].logits, labels),
        "attention_adv": distance(attention(predictions[ADV], labels), kept),
        "attention_clean": distance(attention(predictions[CLEAN], labels), kept),
    }
    return terms["ce"] + settings.alpha * terms["attention_adv"] + settings.beta * terms["attention_clean"], terms


def attention(prediction: Prediction, labels: Tensor) -> Tensor:
    """A(x) of each sample's own class: [B,P] in [0,1]; all 0 where every patch is equally near the text."""
    cosines = torch.einsum("bpd,bd->bp", F.normalize(prediction.tokens, dim=-1), prediction.text[labels])
    low, high = cosines.amin(-1, keepdim=True), cosines.amax(-1, keepdim=True)
    return (cosines - low) / (high - low).clamp_min(1e-12)


def distance(a: Tensor, b: Tensor) -> Tensor:
    """dist of each sample: [B,P] x2 -> [B], smooth where the two are equal."""
    return (squared_distance(a, b) + 1e-6).sqrt()
