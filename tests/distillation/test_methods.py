import numpy as np
import pytest
import torch

from mmtard.config import METHODS, TRUSTS, WEIGHTINGS
from mmtard.distillation import methods
from mmtard.distillation.methods import Pass
from mmtard.errors import UserError
from mmtard.zero_shot import Prediction, ZeroShotHead

B, C, D, P, SCALE = 6, 4, 64, 9, 100.0
RNG = np.random.Generator(np.random.PCG64(1))
LABELS = np.array([0, 3, 1, 1, 2, 0])
PASSES = [Pass(m, v) for m in ("student", "clean", "robust", "start", "third") for v in ("clean", "adv")]
TEXT = RNG.standard_normal((C, D))
TEXT /= np.linalg.norm(TEXT, axis=1, keepdims=True)
Z = {p: RNG.standard_normal((B, D)) * 3 for p in PASSES}
TOKENS = {p: RNG.standard_normal((B, P, D)) * 2 for p in PASSES}
STATE = {"w_robust": 0.7, "w_clean": 0.2, "w_third": 0.1, "entropy_robust": 0.3, "entropy_third": 0.7}
THREE = {"views": {"clean": "clean", "third": "adv", "robust": "adv"}}
APART = {"views": {"robust": "clean_for_adv", "clean": "clean", "third": "adv", "start": "clean"}}
CASES = [
    ("clean", {}),
    ("tecoa", {}),
    ("mmtard", {}),
    ("mmtard", {"weighting": "confidence_sigmoid", "slope": 3.0, "bias": -0.4, "budget": 2.5}),
    ("mmtard", {"robust_weight": 60.0, "clean_weight": 7.0}),
    ("ard", {}),
    ("ard", {"alpha": 0.3, "temperature": 5.0}),
    ("ard", {"alpha": 0.0}),
    ("ard", {"temperature": 1.0, "teacher_view": "adv"}),
    ("fare", {}),
    ("sim_clip", {}),
    ("lore", {}),
    ("agft", {}),
    ("agft", {"gamma": 0.05, "sharpness": 0.7}),
    ("pmg_aft", {}),
    ("pmg_aft", {"general_weight": 0.5, "clean_weight": 2.0}),
    ("tga_zsr", {}),
    ("tga_zsr", {"alpha": 3.0, "beta": 2.0}),
    ("trades", {}),
    ("trades", {"beta": 1.5}),
    ("rslad", {}),
    ("rslad", {"alpha": 0.3}),
    ("iad", {}),
    ("iad", {"beta": 0.9}),
    ("adaad", {}),
    ("adaad", {"alpha": 0.4}),
    ("adaad", {"alpha": 0.0}),
    ("mtard", {}),
    ("mmtard", {"weighting": "uniform", "cross_modal_weight": 7.0}),
    ("mmtard", {**THREE, "cross_modal_weight": 2.0}),
    *(
        ("mmtard", {**THREE, "weighting": w, "slope": 2.0, "bias": 0.6, "budget": 1.5})
        for w in WEIGHTINGS
        if w != "official"
    ),
    ("mmtard", {**APART, "weighting": "uniform"}),
    ("mmtard", {**APART, "temperatures": {"robust": 3.0, "clean": 0.5}}),
    *(("mmtard", {**APART, "weighting": w, "slope": 2.0, "bias": 0.6}) for w in ("confidence_sigmoid", "hardness")),
    *(
        ("mmtard", {**APART, "trust": t, "weighting": "uniform", "temperatures": {"third": 20.0, "robust": 40.0}})
        for t in TRUSTS
        if t != "whole"
    ),
    ("mmtard", {**THREE, "trust": "clean"}),
    ("mmtard", {"views": {"robust": "adv"}, "weighting": "uniform"}),
    ("mmtard", {"views": {"clean": "clean"}, "weighting": "hardness"}),
]


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
    return np.where(a > 0, a * np.log(np.where(a > 0, a, 1) / b), 0).sum(1)


def of_label(values):
    return values[np.arange(B), LABELS]


def attention(model, view):
    """Of each sample's class over the patches: cosines one by one, brought to [0,1]."""
    out = np.empty((B, P))
    for i in range(B):
        for j in range(P):
            token = TOKENS[model, view][i, j]
            out[i, j] = token @ TEXT[LABELS[i]] / np.sqrt(token @ token)
        out[i] = (out[i] - out[i].min()) / (out[i].max() - out[i].min())
    return out


def of_single_teacher(name, s):
    """The mean loss over the batch of every method but the multi-teacher ones, by docs/methods.md, in float64 numpy."""
    adv, clean = p("student", "adv"), p("student", "clean")
    ce_adv, ce_clean = -np.log(of_label(adv)), -np.log(of_label(clean))
    z, z0 = Z["student", "adv"], Z["start", "clean"]
    match name:
        case "clean":
            return ce_clean
        case "tecoa":
            return ce_adv
        case "ard":
            return (
                s.alpha
                * s.temperature**2
                * kl(p("robust", s.teacher_view, s.temperature), p("student", "adv", s.temperature))
                + (1 - s.alpha) * ce_clean
            )
        case "agft":
            target = p("start", "clean", 1 / (s.gamma * s.sharpness))
            return -(target * np.log(p("student", "adv", 1 / s.sharpness))).sum(1)
        case "fare" | "lore":  # whose bound is an added term: test_added_terms.py
            return ((z - z0) ** 2).sum(1)
        case "sim_clip":
            return -(z * z0).sum(1) / np.sqrt((z**2).sum(1) * (z0**2).sum(1))
        case "pmg_aft":
            return ce_adv + s.general_weight * kl(p("start", "adv"), adv) + s.clean_weight * kl(clean, adv)
        case "tga_zsr":
            near = [
                np.sqrt(((attention("student", v) - attention("start", "clean")) ** 2).sum(1) + 1e-6)
                for v in ("adv", "clean")
            ]
            return ce_adv + s.alpha * near[0] + s.beta * near[1]
        case "trades":
            return ce_clean + s.beta * kl(clean, adv)
        case "rslad":
            return s.alpha * kl(p("robust", "clean"), adv) + (1 - s.alpha) * kl(p("robust", "clean"), clean)
        case "iad":
            return kl(p("robust", "clean"), adv) + (1 - of_label(p("robust", "adv")) ** s.beta) * kl(clean, adv)
        case "adaad":
            return s.alpha * kl(p("robust", "adv"), adv) + (1 - s.alpha) * kl(p("robust", "clean"), clean)
    pytest.fail(f"write the equation of {name!r} here, independently of its file in mmtard/distillation/methods/")


def seen_by(view):
    return "adv" if view == "adv" else "clean"


def taught_by(view):
    return "clean" if view == "clean" else "adv"


def target(s, m, v):
    """What teacher m teaches [B,C], by the docstring of `mmtard.distillation.trust`."""
    own = p(m, seen_by(v), s.temperatures.get(m, 1))
    if v == "clean" or s.trust == "whole":
        return own
    match s.trust:
        case "label":
            other = np.eye(C)[LABELS]
            w = 1 - of_label(own)
        case "clean":
            clean = [p(n, "clean", s.temperatures.get(n, 1)) for n, seen in s.views.items() if seen == "clean"]
            other = np.mean(clean, 0)
            w = 1 - (other * own).sum(1)
        case "uncertainty":
            other = np.eye(C)[p("student", "adv").argmax(1)]
            entropy = -(own * np.log(own)).sum(1)
            w = entropy / (entropy + STATE[f"entropy_{m}"])
        case _:
            pytest.fail(f"write the target of {s.trust!r} here, independently of distillation/trust.py")
    assert (w > 1e-3).any() and (w < 0.9).any()
    return (1 - w)[:, None] * own + w[:, None] * other


def weights(s):
    """Each teacher's weight [B] by the docstrings of `mmtard.distillation.weighting`."""
    views, adv = s.views, np.array([[v != "clean"] for v in s.views.values()])
    q = np.stack([p(m, seen_by(v)) for m, v in views.items()])  # [M,B,C]
    sure = q[:, np.arange(B), LABELS]
    match s.weighting:
        case "constant":
            return {m: np.full(B, s.clean_weight if v == "clean" else s.robust_weight) for m, v in s.views.items()}
        case "uniform":
            w = np.full((len(views), B), s.budget / len(views))
        case "official":
            w = np.stack(
                [
                    (s.clean_weight if v == "clean" else s.robust_weight) * of_label(cosines(m, seen_by(v)))
                    for m, v in views.items()
                ]
            )
        case "confidence_sigmoid" | "entropy":
            c = sure if s.weighting == "confidence_sigmoid" else 1 + (q * np.log(q)).sum(2) / np.log(C)
            e = np.exp(s.slope * c + s.bias * adv)
            w = s.budget * e / e.sum(0)
        case "hardness":
            seen = [i for i, v in enumerate(views.values()) if v != "clean"] or range(len(views))
            w = np.tile(
                s.budget / len(views) * (1 + s.slope * (1 - np.mean([sure[i] for i in seen], 0))), (len(views), 1)
            )
        case "mtard":
            w = s.budget * np.array([[STATE[f"w_{m}"]] * B for m in views])
        case _:
            pytest.fail(f"write the weights of {s.weighting!r} here, independently of distillation/weighting.py")
    return dict(zip(views, w))


def expected(name, s):
    if name == "mtard":
        return (
            STATE["w_robust"] * kl(p("robust", "adv"), p("student", "adv"))
            + STATE["w_clean"] * kl(p("clean", "clean"), p("student", "clean"))
        ).mean()
    if name != "mmtard":
        return of_single_teacher(name, s).mean()
    w = weights(s)
    total = 0
    for m, v in s.views.items():
        T = s.temperatures.get(m, 1)
        total = total + w[m] * T**2 * kl(target(s, m, v), p("student", taught_by(v), T))
    total = total / (C if s.weighting in ("official", "constant") else 1)
    for m, v in s.views.items():
        apart = cosines(m, seen_by(v)) - cosines("student", taught_by(v))
        total = total + s.cross_modal_weight * (apart**2).sum(1)
    return total.mean()


def setup(name, options):
    settings, method = METHODS[name](name=name, **options), methods.find_method(name)
    head, tokens = ZeroShotHead(torch.tensor(TEXT), SCALE), settings.tokens
    return (
        settings,
        method,
        OnlyDeclared(
            {q: head(torch.tensor(Z[q]), torch.tensor(TOKENS[q]) if tokens else None) for q in method.passes(settings)}
        ),
    )


def leaves_of(predictions, wanted=lambda q: True):
    """The same predictions as leaves of a graph, so that what a loss reads of each can be told from its gradients."""
    return {
        q: Prediction(*(t if t is None else t.clone().requires_grad_(wanted(q)) for t in pred))
        for q, pred in predictions.items()
    }


def gradients(prediction):
    return [t.grad for t in prediction if t is not None]


@pytest.mark.parametrize("name,options", CASES)
def test_the_loss_is_its_equation_in_float64(name, options):
    settings, method, predictions = setup(name, options)
    loss, terms = method.loss(settings, predictions, torch.tensor(LABELS), STATE)
    assert loss.shape == (B,) and all(t.shape == (B,) for t in terms.values())
    assert loss.mean().item() == pytest.approx(expected(name, settings), rel=1e-11)


def test_the_official_case_has_cosines_of_both_signs():
    for pair in (("robust", "adv"), ("clean", "clean")):
        c = of_label(cosines(*pair))
        assert (c < 0).any() and (c > 0).any()


@pytest.mark.parametrize("name,options", CASES)
def test_the_loss_reads_exactly_the_passes_it_declares(name, options):
    settings, method, predictions = setup(name, options)
    method.loss(settings, predictions, torch.tensor(LABELS), STATE)
    assert predictions.read == method.passes(settings)
    assert {q.model for q in method.passes(settings)} - {"student"} == set(settings.teachers)


@pytest.mark.parametrize("weighting", ["official", "confidence_sigmoid"])
def test_the_weights_are_constants_to_the_gradient(weighting):
    """d KL(p_T || p_S) / d logits_S = p_S - p_T, times the weight and nothing else."""
    settings, method, predictions = setup("mmtard", {"weighting": weighting})
    leaves = leaves_of(predictions)
    loss, terms = method.loss(settings, leaves, torch.tensor(LABELS), STATE)
    loss.mean().backward()
    assert not terms["w_robust"].requires_grad and not terms["w_clean"].requires_grad
    for teacher, view, w in (("robust", "adv", terms["w_robust"]), ("clean", "clean", terms["w_clean"])):
        per_sample = w.numpy()[:, None] / (B * C if weighting == "official" else B)
        analytic = per_sample * (p("student", view) - p(teacher, view))
        np.testing.assert_allclose(leaves["student", view].logits.grad.numpy(), analytic, rtol=1e-9, atol=1e-12)
        assert leaves[teacher, view].cosines.grad is None and leaves[teacher, view].embeddings.grad is None


@pytest.mark.parametrize("name,options", CASES)
def test_the_gradient_reaches_each_student_pass_and_no_weight(name, options):
    settings, method, predictions = setup(name, options)
    leaves = leaves_of(predictions)
    loss, terms = method.loss(settings, leaves, torch.tensor(LABELS), STATE)
    loss.mean().backward()
    for q in leaves:
        found = [g for g in gradients(leaves[q]) if g is not None and g.abs().sum() > 0]
        if q.model == "student" and (q.image == "clean" or options.get("alpha") != 0.0):
            assert found, q
    assert not any(t.requires_grad for n, t in terms.items() if n.startswith("w_"))


def test_stopped_gradients():
    """Where the loss itself, and not the teacher's no_grad, must stop a gradient."""
    for name in ("sim_clip", "iad", "tga_zsr"):
        settings, method, predictions = setup(name, {})
        leaves = leaves_of(predictions)
        method.loss(settings, leaves, torch.tensor(LABELS), STATE)[0].mean().backward()
        for q in leaves.keys() & {("start", "clean"), ("robust", "adv")}:
            assert all(g is None for g in gradients(leaves[q])[:4]), (name, q)


def test_sim_clip_has_the_gradient_of_one_cosine_in_full():
    """d(-cos)/dz = -(u0 - cos u) / |z|, u and u0 unit vectors: not half of it, as with a stopped second term."""
    settings, method, predictions = setup("sim_clip", {})
    leaves = leaves_of(predictions)
    method.loss(settings, leaves, torch.tensor(LABELS), STATE)[0].sum().backward()
    z, z0 = Z["student", "adv"], Z["start", "clean"]
    length = np.sqrt((z**2).sum(1, keepdims=True))
    u, u0 = z / length, z0 / np.sqrt((z0**2).sum(1, keepdims=True))
    analytic = -(u0 - (u * u0).sum(1, keepdims=True) * u) / length
    np.testing.assert_allclose(leaves["student", "adv"].embeddings.grad.numpy(), analytic, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name,options", CASES)
def test_a_method_without_labels_does_not_read_them(name, options):
    settings, method, predictions = setup(name, options)
    given = [
        method.loss(settings, predictions, labels, STATE)[0].mean().item()
        for labels in (torch.tensor(LABELS), torch.tensor((LABELS + 1) % C))
    ]
    assert (given[0] == given[1]) is not settings.labels


def test_attention_that_is_the_same_everywhere_and_attention_that_did_not_move_give_finite_gradients():
    settings, method, predictions = setup("tga_zsr", {})
    same = predictions["start", "clean"]
    leaves = leaves_of({q: same for q in predictions}, lambda q: q.model == "student")
    method.loss(settings, leaves, torch.tensor(LABELS), STATE)[0].mean().backward()
    assert all(leaves[q].tokens.grad.isfinite().all() for q in leaves if q.model == "student")
    flat = same._replace(tokens=torch.ones(B, P, D).double())
    leaves = leaves_of({q: flat if q.image == "adv" else same for q in predictions}, lambda q: q.model == "student")
    loss, _ = method.loss(settings, leaves, torch.tensor(LABELS), STATE)
    loss.mean().backward()
    assert loss.isfinite().all() and all(leaves[q].tokens.grad.isfinite().all() for q in leaves if q.model == "student")


def test_a_head_gives_normalised_cosines_and_float32_logits_of_bf16_embeddings():
    z = torch.tensor(Z["student", "clean"])
    prediction = ZeroShotHead(torch.tensor(TEXT), SCALE)(z)
    np.testing.assert_allclose(prediction.cosines.numpy(), cosines("student", "clean"), rtol=1e-12)
    np.testing.assert_allclose(prediction.logits.numpy(), SCALE * cosines("student", "clean"), rtol=1e-12)
    assert prediction.embeddings.equal(z)
    low = ZeroShotHead(torch.tensor(TEXT).float(), SCALE)(z.bfloat16())
    assert low.logits.dtype == low.cosines.dtype == torch.float32
    np.testing.assert_allclose(
        low.logits.numpy(), SCALE * cosines("student", "clean"), atol=SCALE * 2**-7
    )  # bf16 has 8 bits


def test_every_method_of_the_schema_has_a_file_and_a_case_here():
    assert set(METHODS) == {name for name, _ in CASES}, "CASES above needs one of each"
    for name in METHODS:
        assert methods.find_method(name).__name__ == f"mmtard.distillation.methods.{name}"


def test_an_unknown_method_is_answered_with_the_known_ones():
    with pytest.raises(
        UserError,
        match="unknown method 'mmtrd'; known: adaad, agft, ard,"
        " clean, fare, iad, lore, mmtard, mtard, pmg_aft, rslad, sim_clip, tecoa, tga_zsr, trades",
    ):
        methods.find_method("mmtrd")
