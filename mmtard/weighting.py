"""Per-sample weights of the teachers in multi-teacher distillation.

A weighting is a function of the named `Prediction`s of the robust teacher on the adversarial image and the clean
teacher on the clean image; it returns one weight per sample for each, without gradient.
"""

import torch
from torch import Tensor

from .errors import unknown
from .losses import true_class


def official(cos_robust: Tensor, cos_clean: Tensor, labels: Tensor, robust_weight: float, clean_weight: float) -> tuple[Tensor, Tensor]:
    """The weights of the published MMT-ARD code: factor times the raw cosine to the true class.

    cos_robust [B,C] = <z_Tr(x'), t_k>, cos_clean [B,C] = <z_Tc(x), t_k>, labels [B] -> (w_r [B], w_c [B]) with
    w_r = robust_weight * c^r_i and w_c = clean_weight * c^c_i (50 and 5 in the published recipe). A cosine can be
    negative, and its weight then pushes the student away from that teacher: that is the recipe.
    """
    return robust_weight * true_class(cos_robust, labels), clean_weight * true_class(cos_clean, labels)


def confidence_sigmoid(p_robust: Tensor, p_clean: Tensor, labels: Tensor, slope: float, bias: float, budget: float) -> tuple[Tensor, Tensor]:
    """Ours, not the paper's: a fixed budget split by which teacher is surer of the true class.

    p_robust [B,C] = p_Tr(x'), p_clean [B,C] = p_Tc(x), labels [B] -> (budget * g [B], budget * (1 - g) [B]) with
    g_i = sigmoid(slope * (p_Tr(x'_i)[y_i] - p_Tc(x_i)[y_i]) + bias).
    """
    g = torch.sigmoid(slope * (true_class(p_robust, labels) - true_class(p_clean, labels)) + bias)
    return budget * g, budget * (1 - g)


def teacher_weights(settings, robust, clean, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(w_robust [B], w_clean [B]) by `settings.weighting` from the two teachers' Predictions; no gradient."""
    with torch.no_grad():
        if settings.weighting == "official":
            return official(robust.cosines, clean.cosines, labels, settings.robust_weight, settings.clean_weight)
        if settings.weighting == "confidence_sigmoid":
            p_robust, p_clean = robust.logits.softmax(-1), clean.logits.softmax(-1)
            return confidence_sigmoid(p_robust, p_clean, labels, settings.slope, settings.bias, settings.budget)
    raise unknown("weighting", settings.weighting, ("official", "confidence_sigmoid"))
