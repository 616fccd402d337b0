import numpy as np
import pytest
import torch

from mmtard import methods, objectives
from mmtard.config import ATTACK_OBJECTIVES, METHODS
from mmtard.errors import UserError
from mmtard.methods import Head, Pass, Prediction

B, C, D, SCALE = 6, 4, 64, 100.0
RNG = np.random.Generator(np.random.PCG64(1))
LABELS = np.array([0, 3, 1, 1, 2, 0])
PASSES = [Pass(m, v) for m in ("student", "clean", "robust") for v in ("clean", "adv")]
TEXT = RNG.standard_normal((C, D))
TEXT /= np.linalg.norm(TEXT, axis=1, keepdims=True)
Z = {p: RNG.standard_normal((B, D)) * 3 for p in PASSES}
CASES = [
    ("clean", {}), ("tecoa", {}), ("mmtard", {}), ("mmtard", {"weighting": "confidence_sigmoid", "slope": 3.0, "bias": -0.4, "budget": 2.5}),
    ("mmtard", {"robust_weight": 60.0, "clean_weight": 7.0}), ("ard", {}), ("ard", {"alpha": 0.3, "temperature": 5.0}),
    ("ard", {"alpha": 0.0}), ("ard", {"temperature": 1.0, "teacher_view": "adv"}),
]  # fmt: skip


class OnlyDeclared(dict):
    """Predictions that note what is read; a pass that was not declared is absent and raises KeyError."""

    def __init__(self, predictions):
        super().__init__(predictions)
        self.read = set()

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)


def cosines(model, view):
    z = Z[model, view]
    return z / np.sqrt((z**2).sum(1, keepdims=True)) @ TEXT.T


def p(model, view, temperature=1.0):
    e = np.exp(SCALE * cosines(model, view) / temperature)  # at most e^100: fits float64
    return e / e.sum(1, keepdims=True)


def kl(a, b):
    return (a * np.log(a / b)).sum(1)


def of_label(values):
    return values[np.arange(B), LABELS]


def expected(name, s):
    """The mean loss over the batch by method.md, in float64 numpy."""
    if name in ("clean", "tecoa"):
        return -np.log(of_label(p("student", "clean" if name == "clean" else "adv"))).mean()
    if name == "ard":
        a, T = s.alpha, s.temperature
        ce = -np.log(of_label(p("student", "clean")))
        return (a * T**2 * kl(p("robust", s.teacher_view, T), p("student", "adv", T)) + (1 - a) * ce).mean()
    kl_r, kl_c = kl(p("robust", "adv"), p("student", "adv")), kl(p("clean", "clean"), p("student", "clean"))
    if s.weighting == "official":
        c_r, c_c = of_label(cosines("robust", "adv")), of_label(cosines("clean", "clean"))
        return (s.robust_weight * c_r * kl_r + s.clean_weight * c_c * kl_c).sum() / (B * C)
    g = 1 / (1 + np.exp(-(s.slope * (of_label(p("robust", "adv")) - of_label(p("clean", "clean"))) + s.bias)))
    return (s.budget * g * kl_r + s.budget * (1 - g) * kl_c).mean()


def setup(name, options):
    settings, method = METHODS[name](name=name, **options), methods.find(name)
    head = Head(torch.tensor(TEXT), SCALE)
    return settings, method, OnlyDeclared({q: head(torch.tensor(Z[q])) for q in method.passes(settings)})


@pytest.mark.parametrize("name,options", CASES)
def test_the_loss_is_its_equation_in_float64(name, options):
    settings, method, predictions = setup(name, options)
    loss, terms = method.loss(settings, predictions, torch.tensor(LABELS))
    assert loss.shape == (B,) and all(t.shape == (B,) for t in terms.values())
    assert loss.mean().item() == pytest.approx(expected(name, settings), rel=1e-11)


def test_the_official_case_has_cosines_of_both_signs():
    for pair in (("robust", "adv"), ("clean", "clean")):
        c = of_label(cosines(*pair))
        assert (c < 0).any() and (c > 0).any()


@pytest.mark.parametrize("name,options", CASES)
def test_the_loss_reads_exactly_the_passes_it_declares(name, options):
    settings, method, predictions = setup(name, options)
    method.loss(settings, predictions, torch.tensor(LABELS))
    assert predictions.read == method.passes(settings)
    assert {q.model for q in method.passes(settings)} - {"student"} == set(settings.teachers)


@pytest.mark.parametrize("weighting", ["official", "confidence_sigmoid"])
def test_the_weights_are_constants_to_the_gradient(weighting):
    """d KL(p_T || p_S) / d logits_S = p_S - p_T, times the weight and nothing else."""
    settings, method, predictions = setup("mmtard", {"weighting": weighting})
    leaves = {q: Prediction(*(t.clone().requires_grad_() for t in pred)) for q, pred in predictions.items()}
    loss, terms = method.loss(settings, leaves, torch.tensor(LABELS))
    loss.mean().backward()
    assert not terms["w_robust"].requires_grad and not terms["w_clean"].requires_grad
    for teacher, view, w in (("robust", "adv", terms["w_robust"]), ("clean", "clean", terms["w_clean"])):
        per_sample = w.numpy()[:, None] / (B * C if weighting == "official" else B)
        analytic = per_sample * (p("student", view) - p(teacher, view))
        np.testing.assert_allclose(leaves["student", view].logits.grad.numpy(), analytic, rtol=1e-9, atol=1e-12)
        assert leaves[teacher, view].cosines.grad is None and leaves[teacher, view].embeddings.grad is None


@pytest.mark.parametrize("name,options", CASES)
def test_the_gradient_reaches_each_student_pass(name, options):
    settings, method, predictions = setup(name, options)
    leaves = {q: Prediction(*(t.clone().requires_grad_(q.model == "student") for t in pred)) for q, pred in predictions.items()}
    loss, _ = method.loss(settings, leaves, torch.tensor(LABELS))
    loss.mean().backward()
    for q in leaves:
        if q.model == "student" and (q.view == "clean" or options.get("alpha") != 0.0):
            assert leaves[q].logits.grad.abs().sum() > 0, q


def test_a_head_gives_normalised_cosines_and_float32_logits_of_bf16_embeddings():
    z = torch.tensor(Z["student", "clean"])
    prediction = Head(torch.tensor(TEXT), SCALE)(z)
    np.testing.assert_allclose(prediction.cosines.numpy(), cosines("student", "clean"), rtol=1e-12)
    np.testing.assert_allclose(prediction.logits.numpy(), SCALE * cosines("student", "clean"), rtol=1e-12)
    assert prediction.embeddings.equal(z)
    low = Head(torch.tensor(TEXT).float(), SCALE)(z.bfloat16())
    assert low.logits.dtype == low.cosines.dtype == torch.float32
    np.testing.assert_allclose(low.logits.numpy(), SCALE * cosines("student", "clean"), atol=SCALE * 2**-7)  # bf16 has 8 bits


def test_every_method_of_the_schema_has_a_file_and_a_case_here():
    assert set(METHODS) == {name for name, _ in CASES}
    for name in METHODS:
        assert methods.find(name).__name__ == f"mmtard.methods.{name}"


def test_an_unknown_method_is_answered_with_the_known_ones():
    with pytest.raises(UserError, match="unknown method 'mmtrd'; known: ard, clean, mmtard, tecoa"):
        methods.find("mmtrd")


# ---------------------------------------------------------------- what an attack maximises


def test_the_objectives_are_those_of_the_schema_and_ask_for_the_same_teachers():
    assert {n: t and t.model for n, t in objectives.TARGETS.items()} == {n: "student" if n == "kl_self" else t for n, t in ATTACK_OBJECTIVES.items()}
    assert all(t is None or t.view == "clean" for t in objectives.TARGETS.values())
    with pytest.raises(UserError, match="unknown attack objective 'cw'; known: ce, kl_clean, kl_robust, kl_self"):
        objectives.target_pass("cw")


@pytest.mark.parametrize("name,model", [("kl_clean", "clean"), ("kl_robust", "robust"), ("kl_self", "student"), ("ce", None)])
def test_attack_objectives_measure_the_perturbed_student_against_a_fixed_target(name, model):
    head = Head(torch.tensor(TEXT), SCALE)
    target = model and head(torch.tensor(Z[model, "clean"]).requires_grad_())
    student = head(torch.tensor(Z["student", "adv"]).requires_grad_())
    loss = objectives.attack_loss(name, target, torch.tensor(LABELS))(student)
    p_s = p("student", "adv")
    np.testing.assert_allclose(loss.detach().numpy(), -np.log(of_label(p_s)) if model is None else kl(p(model, "clean"), p_s), rtol=1e-11, atol=1e-14)
    loss.sum().backward(inputs=[t.embeddings for t in (student, target) if t])
    assert student.embeddings.grad.abs().sum() > 0
    assert target is None or target.embeddings.grad is None
