"""`mmtard`: multi-teacher adversarially robust distillation (arXiv 2511.17448),

    L_i = w^r_i * KL(p_Tr(x'_i) || p_S(x'_i)) + w^c_i * KL(p_Tc(x_i) || p_S(x_i)).

`weighting: official` is the published recipe, whose loss is the mean over samples AND classes:
L = 1/(B*C) sum_i [ 50 c^r_i KL + 5 c^c_i KL ], so its L_i above is divided by C. `confidence_sigmoid` is ours and is a plain
mean over samples. The attack maximises KL(p_Tc(x) || p_S(x')), the clean teacher on the clean image.
"""

from ..losses import kl
from ..weighting import teacher_weights
from . import Pass

STUDENT_ADV, STUDENT_CLEAN = Pass("student", "adv"), Pass("student", "clean")
ROBUST, CLEAN = Pass("robust", "adv"), Pass("clean", "clean")


def passes(settings) -> set[Pass]:
    return {STUDENT_ADV, STUDENT_CLEAN, ROBUST, CLEAN}


def loss(settings, predictions, labels):
    robust, clean = predictions[ROBUST], predictions[CLEAN]
    w_robust, w_clean = teacher_weights(settings, robust, clean, labels)
    kl_robust = kl(robust.logits, predictions[STUDENT_ADV].logits)
    kl_clean = kl(clean.logits, predictions[STUDENT_CLEAN].logits)
    total = w_robust * kl_robust + w_clean * kl_clean
    if settings.weighting == "official":
        total = total / robust.logits.shape[-1]
    return total, {"kl_robust": kl_robust, "kl_clean": kl_clean, "w_robust": w_robust, "w_clean": w_clean}
