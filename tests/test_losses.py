import numpy as np
import pytest
import torch

from mmtard import losses
from mmtard.errors import UserError

RNG = np.random.Generator(np.random.PCG64(0))
T_LOGITS, S_LOGITS = 4 * RNG.standard_normal((2, 6, 5))
LABELS = np.array([0, 4, 2, 2, 1, 3])


def softmax(logits):
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def close(actual, expected):
    """Float64 in, so nothing but rounding may differ."""
    assert actual.dtype == torch.float64
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 30.0])
def test_kl_is_the_sum_of_p_log_p_over_q_without_a_temperature_factor(temperature):
    p, q = softmax(T_LOGITS / temperature), softmax(S_LOGITS / temperature)
    close(losses.kl(torch.tensor(T_LOGITS), torch.tensor(S_LOGITS), temperature), (p * np.log(p / q)).sum(1))


def test_kl_of_two_coins_by_hand():
    teacher, student = torch.tensor([[0.75, 0.25]]).double().log(), torch.tensor([[0.5, 0.5]]).double().log()
    close(losses.kl(teacher, student), [0.75 * np.log(1.5) + 0.25 * np.log(0.5)])
    close(losses.kl(student, teacher), [0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(2)])
    close(losses.kl(teacher + 7, teacher), [0])


def test_kl_stays_finite_at_clip_logits_that_underflow_float32():
    teacher = torch.tensor([[100.0, -100.0, 0.0]])
    student = torch.tensor([[-100.0, 100.0, 0.0]], requires_grad=True)
    value = losses.kl(teacher, student)
    value.sum().backward()
    assert value.item() == pytest.approx(200, rel=1e-6)  # p_T is one-hot: log p_T - log p_S = 0 + 200
    assert torch.allclose(student.grad, torch.tensor([[-1.0, 1.0, 0.0]]), atol=1e-6)


def test_cross_entropy_is_minus_the_log_probability_of_the_label():
    expected = -np.log(softmax(S_LOGITS)[np.arange(6), LABELS])
    close(losses.cross_entropy(torch.tensor(S_LOGITS), torch.tensor(LABELS)), expected)


def test_class_cosines_normalise_the_image_side_only():
    z, t = RNG.standard_normal((4, 7)), RNG.standard_normal((3, 7))
    t /= np.linalg.norm(t, axis=1, keepdims=True)
    expected = np.array([[a @ b / np.sqrt(a @ a) for b in t] for a in z])
    close(losses.class_cosines(torch.tensor(z), torch.tensor(t)), expected)
    close(losses.class_cosines(torch.tensor(9 * z), torch.tensor(t)), expected)
    close(losses.class_cosines(torch.tensor(z), torch.tensor(2 * t)), 2 * expected)


def test_squared_distance_is_of_the_embeddings_as_they_are():
    a, b = RNG.standard_normal((2, 4, 7))
    close(
        losses.squared_distance(torch.tensor(a), torch.tensor(b)),
        [sum((x - y) ** 2 for x, y in zip(*pair)) for pair in zip(a, b)],
    )


def test_true_class_and_top1_look_at_each_samples_own_label():
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, 4.0, 6.0], [0.0, -1.0, -2.0]])
    labels = torch.tensor([1, 0, 0])
    assert losses.true_class(logits, labels).tolist() == [3.0, 5.0, 0.0]
    assert losses.top1(logits, labels).tolist() == [True, False, True]


def test_margin_is_to_the_best_other_class():
    expected = [row[y] - max(v for i, v in enumerate(row) if i != y) for row, y in zip(T_LOGITS, LABELS)]
    assert min(expected) < 0 < max(expected)
    close(losses.margin(torch.tensor(T_LOGITS), torch.tensor(LABELS)), expected)


def test_dlr_is_equation_6_of_croce_and_hein():
    expected = []
    for z, y in zip(T_LOGITS, LABELS):
        first, second, third = np.sort(z)[::-1][:3]
        expected.append(-(z[y] - (second if z[y] == first else first)) / (first - third))
    close(losses.dlr(torch.tensor(T_LOGITS), torch.tensor(LABELS)), expected)
    close(losses.dlr(torch.tensor(100 * T_LOGITS + 7), torch.tensor(LABELS)), expected)  # neither scale nor shift
    # by hand: z = (3, 2, 1), and the label is each in turn: -(3 - 2) / 2, -(2 - 3) / 2, -(1 - 3) / 2
    close(losses.dlr(torch.tensor([[3.0, 2.0, 1.0]] * 3).double(), torch.arange(3)), [-0.5, 0.5, 1.0])


def test_targeted_dlr_is_equation_7_of_croce_and_hein():
    targets = (LABELS + 1) % 5
    expected = []
    for z, y, t in zip(T_LOGITS, LABELS, targets):
        pi = np.sort(z)[::-1]
        expected.append(-(z[y] - z[t]) / (pi[0] - (pi[2] + pi[3]) / 2))
    close(losses.targeted_dlr(torch.tensor(T_LOGITS), torch.tensor(LABELS), torch.tensor(targets)), expected)
    close(losses.targeted_dlr(torch.tensor(50 * T_LOGITS - 3), torch.tensor(LABELS), torch.tensor(targets)), expected)
    # by hand: z = (4, 3, 2, 0), label 0, target 3: -(4 - 0) / (4 - 1)
    close(
        losses.targeted_dlr(torch.tensor([[4.0, 3.0, 2.0, 0.0]]).double(), torch.tensor([0]), torch.tensor([3])),
        [-4 / 3],
    )


def test_a_saturated_softmax_has_no_gradient_but_its_ratio_of_logits_has():
    logits = torch.tensor([[500.0, 100.0, 0.0, -100.0]], requires_grad=True)
    label = torch.tensor([0])
    assert (torch.autograd.grad(losses.cross_entropy(logits, label).sum(), logits)[0] == 0).all()
    assert (torch.autograd.grad(losses.dlr(logits, label).sum(), logits)[0] != 0).any()


def test_a_logit_that_is_not_finite_is_never_a_prediction():
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[1.0, 3.0], [nan, 2.0], [inf, 0.0], [-inf, 0.0], [nan, nan], [5.0, 4.0]])
    assert losses.predicted_class(logits).tolist() == [1, -1, -1, -1, -1, 0]
    labels = torch.tensor([1, 0, 0, 1, 0, 0])
    assert losses.top1(logits, labels).tolist() == [True, False, False, False, False, True]


def test_losses_refuse_what_would_broadcast_or_fail_deep_inside():
    logits, labels = torch.randn(6, 5), torch.tensor(LABELS)
    for call, message in (
        (
            lambda: losses.cross_entropy(logits, labels[:, None]),
            r"labels: int64 \[6, 1\] beside logits float32 \[6, 5\]",
        ),
        (lambda: losses.cross_entropy(logits, labels.int()), r"labels: int32 \[6\] .* give int64 \[6\]"),
        (lambda: losses.cross_entropy(logits[0], labels), r"logits: float32 \[5\]; give floating-point"),
        (lambda: losses.cross_entropy(logits.long(), labels), r"logits: int64 \[6, 5\]"),
        (lambda: losses.cross_entropy(logits, labels.to("meta")), "labels: on meta, logits on cpu"),
        (lambda: losses.kl(logits, logits[:1]), r"student_logits: float32 \[1, 5\] beside teacher_logits"),
        (lambda: losses.kl(logits, logits, 0.0), "temperature: 0.0 is not positive"),
        (lambda: losses.kl_of_mean([logits], [0.5, 0.5], logits), "weights: 2 of them for 1 teachers"),
        (lambda: losses.kl_of_mean([logits] * 2, [0.9, 0.9], logits), "are not positive numbers of sum 1"),
        (lambda: losses.kl_of_mean([logits[:2]], [1.0], logits), r"teacher_logits: float32 \[2, 5\]"),
        (lambda: losses.squared_distance(logits, logits[:, :1]), r"b: float32 \[6, 1\] beside a float32 \[6, 5\]"),
        (lambda: losses.class_cosines(logits, logits.T), r"class_embeddings: float32 \[5, 6\] .* give \[C,5\]"),
        (lambda: losses.true_class(logits, labels.tolist()), "labels: a list beside values"),
        (lambda: losses.dlr(logits[:, :2], labels), "logits: 2 classes, and this loss needs 3"),
        (lambda: losses.targeted_dlr(logits[:, :3], labels, labels), "logits: 3 classes, and this loss needs 4"),
        (lambda: losses.margin(logits[:, :1], labels), "logits: 1 classes, and this loss needs 2"),
        (lambda: losses.top1(logits, labels[:2]), r"labels: int64 \[2\]"),
    ):
        with pytest.raises(UserError, match=message):
            call()
