"""`mmtard`: multi-teacher adversarially robust distillation (arXiv 2511.17448), for any number of teachers m with
views x^m,

    L_i = sum_m w^m_i * KL(p_m(x^m_i) || p_S(x^m_i)) + lambda * sum_m ||c_m(x^m_i) - c_S(x^m_i)||^2.

By default the robust teacher sees x' and the clean one x, as published. `weighting: official` is the published
recipe, whose loss is the mean over samples AND classes: L = 1/(B*C) sum_i [ 50 c^r_i KL + 5 c^c_i KL ], so that its
L_i is divided by C; so is that of `constant`, which leaves the cosines c away. Under the other weightings the loss is
a plain mean over samples. The attack maximises KL(p_Tc(x) || p_S(x')), the clean teacher on the clean image. The
second sum is ours, with c_M(x) the cosines of M's image embedding with its class embeddings: it keeps the student's
image-text similarity matrix near the teachers'; lambda (`cross_modal_weight`) is 0 unless set.

A teacher with the view `clean_for_adv` teaches KL(p_m(x_i) || p_S(x'_i)), as the single-teacher predecessor does. A
teacher's temperature T makes its term T^2 KL(p^T || p_S^T), as in `ard`. `trust` mixes the targets of the teachers of
x': see `mmtard.distillation.trust`.
"""

from ...losses import kl, squared_distance
from .. import trust, weighting
from . import Pass

SEEN = {"clean": "clean", "adv": "adv", "clean_for_adv": "clean"}  # the image of a teacher by its view
TAUGHT = {"clean": "clean", "adv": "adv", "clean_for_adv": "adv"}  # and the student's


def passes(settings) -> set[Pass]:
    """Each teacher on the image of its view, and the student on every image it is taught on."""
    return {Pass(name, SEEN[view]) for name, view in settings.views.items()} | {
        Pass("student", TAUGHT[view]) for view in settings.views.values()
    }


def loss(settings, predictions, labels, state):
    """The weighted sum over the teachers, sample by sample: ([B], terms with each teacher's weight)."""
    views = settings.views
    teachers = {name: predictions[name, SEEN[view]] for name, view in views.items()}
    students = {name: predictions["student", TAUGHT[view]] for name, view in views.items()}
    w = weighting.teacher_weights(settings, teachers, labels, state)
    mixed, trust_terms = trust.log_targets(settings, teachers, students, labels, state)
    terms = {f"kl_{name}": _kl(settings, name, teachers[name], students[name], mixed.get(name)) for name in views}
    total = sum(w[name] * terms[f"kl_{name}"] for name in views)
    if settings.weighting in ("official", "constant"):
        total = total / teachers[next(iter(views))].logits.shape[-1]
    if settings.cross_modal_weight:
        terms["cross_modal"] = sum(squared_distance(teachers[name].cosines, students[name].cosines) for name in views)
        total = total + settings.cross_modal_weight * terms["cross_modal"]
    return total, terms | trust_terms | {f"w_{name}": w[name] for name in views}


def _kl(settings, name, teacher, student, log_target):
    """T^2 KL(target^T || p_S^T) of each sample: the teacher's own prediction, or its mixed log target [B,C]."""
    T = settings.temperatures.get(name, 1.0)
    if log_target is None:
        return T**2 * kl(teacher.logits, student.logits, T)
    return T**2 * kl(log_target, student.logits / T)


def first_state(settings) -> dict[str, float]:
    """Equal weights of the teachers under the weighting `mtard`; none under the others."""
    return weighting.balanced_start(settings.views) if settings.weighting == "mtard" else {}


def next_state(settings, state, means) -> dict[str, float]:
    """The state after a step whose terms had these means: the weights of `mtard`, the medians of `uncertainty`."""
    if settings.trust == "uncertainty":
        state = trust.next_medians(settings, state, means)
    if settings.weighting != "mtard":
        return state
    losses = {name: means[f"kl_{name}"] for name in settings.views}
    return state | weighting.balanced_next(settings.rate, state, losses)
