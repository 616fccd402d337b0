"""`mmtard`: multi-teacher adversarially robust distillation (arXiv 2511.17448), for any number of teachers m with
views x^m,

    L_i = sum_m w^m_i * KL(p_m(x^m_i) || p_S(x^m_i)) + lambda * sum_m ||c_m(x^m_i) - c_S(x^m_i)||^2.

By default the robust teacher sees x' and the clean one x, as published. `weighting: official` is the published
recipe, whose loss is the mean over samples AND classes: L = 1/(B*C) sum_i [ 50 c^r_i KL + 5 c^c_i KL ], so that its
L_i is divided by C; so is that of `constant`, which leaves the cosines c away. Under the other weightings the loss is
a plain mean over samples. The attack maximises KL(p_Tc(x) || p_S(x')), the clean teacher on the clean image. The
second sum is ours, with c_M(x) the cosines of M's image embedding with its class embeddings: it keeps the student's
image-text similarity matrix near the teachers'; lambda (`cross_modal_weight`) is 0 unless set.
"""

from ...losses import kl, squared_distance
from .. import weighting
from . import Pass


def passes(settings) -> set[Pass]:
    return {Pass(name, view) for name, view in settings.views.items()} | {
        Pass("student", view) for view in settings.views.values()
    }


def loss(settings, predictions, labels, state):
    views = settings.views
    teachers = {name: predictions[name, view] for name, view in views.items()}
    students = {name: predictions["student", view] for name, view in views.items()}
    w = weighting.teacher_weights(settings, teachers, labels, state)
    terms = {f"kl_{name}": kl(teachers[name].logits, students[name].logits) for name in views}
    total = sum(w[name] * terms[f"kl_{name}"] for name in views)
    if settings.weighting in ("official", "constant"):
        total = total / teachers[next(iter(views))].logits.shape[-1]
    if settings.cross_modal_weight:
        terms["cross_modal"] = sum(squared_distance(teachers[name].cosines, students[name].cosines) for name in views)
        total = total + settings.cross_modal_weight * terms["cross_modal"]
    return total, terms | {f"w_{name}": w[name] for name in views}


def first_state(settings) -> dict[str, float]:
    return weighting.balanced_start(settings.views) if settings.weighting == "mtard" else {}


def next_state(settings, state, means) -> dict[str, float]:
    if settings.weighting != "mtard":
        return state
    return weighting.balanced_next(settings.rate, state, {name: means[f"kl_{name}"] for name in settings.views})
