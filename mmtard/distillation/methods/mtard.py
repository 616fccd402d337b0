"""`mtard`: multi-teacher adversarial robustness distillation with balanced losses,

    w_r * KL(p_Tr(x') || p_S(x')) + w_c * KL(p_Tc(x) || p_S(x)),      w_r + w_c = 1,

the attack on CE. Zhao et al., "Enhanced Accuracy and Robustness via Multi-Teacher Adversarial Distillation", ECCV
2022. The weights start equal and follow the relative losses with `rate` (.025): see `mmtard.weighting.balanced_next`.
"""

import torch

from ...losses import kl
from .. import weighting
from . import Pass

VIEWS = {"robust": "adv", "clean": "clean"}


def passes(settings) -> set[Pass]:
    """The robust teacher on x' and the clean one on x, and the student on both."""
    return {Pass(model, view) for name, view in VIEWS.items() for model in ("student", name)}


def loss(settings, predictions, labels, state):
    """The balanced sum of the two teachers' KL: ([B], terms with the weights). Reads no labels."""
    terms = {
        f"kl_{name}": kl(predictions[name, view].logits, predictions["student", view].logits)
        for name, view in VIEWS.items()
    }
    total = sum(state[f"w_{name}"] * terms[f"kl_{name}"] for name in VIEWS)
    return total, terms | {f"w_{name}": torch.full_like(total, state[f"w_{name}"]) for name in VIEWS}


def first_state(settings) -> dict[str, float]:
    """Equal weights of both teachers."""
    return weighting.balanced_start(VIEWS)


def next_state(settings, state, means) -> dict[str, float]:
    """The weights after a step whose terms had these means."""
    return weighting.balanced_next(settings.rate, state, {name: means[f"kl_{name}"] for name in VIEWS})
