"""Per-sample losses between two models, or between a model and labels. Pure functions of tensors.

Each checks the shapes and types of what it is given and raises UserError where they do not fit. It looks at no
values, so that a GPU is never waited for: labels must be classes, 0 <= y < C.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UserError

NO_CLASS = -1  # what is predicted where a logit is not finite


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each sample: logits [B,C], labels int64 [B] -> [B], in nats."""
    _check_logits(logits, labels=labels)
    return F.cross_entropy(logits, labels, reduction="none")


def kl(teacher_logits: Tensor, student_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p_T || p_S) of each sample: logits [B,C] x2 -> [B], in nats, of softmax(logits / temperature).

    Hinton et al. 2015, without their factor temperature^2: the caller's equation says whether it applies.
    """
    _check_logits(teacher_logits, "teacher_logits")
    _check_same_shape(student_logits, "student_logits", teacher_logits, "teacher_logits")
    if not temperature > 0:
        raise UserError(f"temperature: {temperature} is not positive; write 1.0 for the logits as they are")
    log_p_t = F.log_softmax(teacher_logits / temperature, dim=-1)
    log_p_s = F.log_softmax(student_logits / temperature, dim=-1)
    return F.kl_div(log_p_s, log_p_t, reduction="none", log_target=True).sum(-1)


def kl_of_mean(teacher_logits: Sequence[Tensor], weights: Sequence[float], student_logits: Tensor) -> Tensor:
    """KL(sum_m w_m p_m || p_S) of each sample: logits [B,C] of each teacher, weights of sum 1 -> [B], in nats."""
    if not teacher_logits or len(teacher_logits) != len(weights):
        raise UserError(f"weights: {len(weights)} of them for {len(teacher_logits)} teachers; give each teacher one")
    if min(weights) <= 0 or abs(sum(weights) - 1) > 1e-6:
        raise UserError(f"weights: {list(weights)} are not positive numbers of sum 1; divide them by their sum")
    _check_logits(student_logits, "student_logits")
    for logits in teacher_logits:
        _check_same_shape(logits, "teacher_logits", student_logits, "student_logits")
    log_p = torch.stack([F.log_softmax(t, dim=-1) + math.log(w) for t, w in zip(teacher_logits, weights)]).logsumexp(0)
    return F.kl_div(F.log_softmax(student_logits, dim=-1), log_p, reduction="none", log_target=True).sum(-1)


def true_class(values: Tensor, labels: Tensor) -> Tensor:
    """The entry of each sample's own class: values [B,C], labels int64 [B] -> [B]."""
    _check_logits(values, "values", labels=labels)
    return values.gather(1, labels[:, None]).squeeze(1)


def class_cosines(embeddings: Tensor, class_embeddings: Tensor) -> Tensor:
    """Cosines <z(x), t_k>: embeddings [B,D] of any length, class_embeddings [C,D] normalised -> [B,C]."""
    _check_logits(embeddings, "embeddings")
    if class_embeddings.dim() != 2 or class_embeddings.shape[1] != embeddings.shape[1]:
        raise UserError(
            f"class_embeddings: {_shape(class_embeddings)} beside embeddings {_shape(embeddings)}; "
            f"give [C,{embeddings.shape[1]}], a row for each class"
        )
    return F.normalize(embeddings, dim=-1) @ class_embeddings.T


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """||a - b||^2 of each sample: [B,D] x2, not normalised -> [B]."""
    _check_same_shape(b, "b", a, "a")
    return (a - b).square().sum(-1)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """z_y - max_{i != y} z_i of each sample: logits [B,C >= 2], labels int64 [B] -> [B]; negative: misclassified."""
    _check_logits(logits, labels=labels, classes=2)
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return true_class(logits, labels) - others.max(1).values


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio, -(z_y - max_{i != y} z_i) / (z_pi1 - z_pi3).

    logits [B,C >= 3], labels int64 [B] -> [B]; z_pi1 >= z_pi2 >= ... are the sorted logits. Invariant to the logits'
    scale and shift. Croce & Hein, ICML 2020, equation 6.
    """
    _check_logits(logits, labels=labels, classes=3)
    z = logits.topk(3).values
    return -margin(logits, labels) / (z[:, 0] - z[:, 2] + 1e-12)


def targeted_dlr(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """-(z_y - z_t) / (z_pi1 - (z_pi3 + z_pi4) / 2): it rises as the target class gains on the label's.

    logits [B,C >= 4], labels and targets int64 [B] -> [B]. Croce & Hein, ICML 2020, equation 7.
    """
    _check_logits(logits, labels=labels, classes=4)
    z = logits.topk(4).values
    return (true_class(logits, targets) - true_class(logits, labels)) / (z[:, 0] - (z[:, 2] + z[:, 3]) / 2 + 1e-12)


def predicted_class(logits: Tensor) -> Tensor:
    """The class of the highest logit: [B,C] -> int64 [B]; NO_CLASS (-1) where any logit of a sample is not finite."""
    _check_logits(logits)
    return logits.argmax(-1).masked_fill(~logits.isfinite().all(-1), NO_CLASS)


def top1(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the highest logit is the label's: [B,C], int64 [B] -> bool [B]; never where a logit is not finite."""
    _check_logits(logits, labels=labels)
    return torch.eq(predicted_class(logits), labels)


def _check_logits(logits: Tensor, name: str = "logits", labels: Tensor | None = None, classes: int = 1) -> None:
    """UserError unless logits are floats [B,C] with C >= classes, and labels, if given, int64 [B] on their device."""
    if not isinstance(logits, Tensor) or logits.dim() != 2 or not logits.is_floating_point():
        raise UserError(f"{name}: {_shape(logits)}; give floating-point numbers [B,C], a row for each sample")
    if logits.shape[1] < classes:
        raise UserError(f"{name}: {logits.shape[1]} classes, and this loss needs {classes}; take another loss")
    if labels is None:
        return
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != logits.shape[:1]:
        raise UserError(
            f"labels: {_shape(labels)} beside {name} {_shape(logits)}; give int64 [{len(logits)}], a class for each"
        )
    if labels.device != logits.device:
        raise UserError(f"labels: on {labels.device}, {name} on {logits.device}; move them with labels.to(...)")


def _check_same_shape(b: Tensor, name: str, a: Tensor, other: str) -> None:
    """UserError unless both are [B,D] of one shape: broadcasting would give each sample another one's number."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.dim() != 2 or a.shape != b.shape:
        raise UserError(f"{name}: {_shape(b)} beside {other} {_shape(a)}; give two tensors of one shape [B,D]")


def _shape(given: object) -> str:
    if not isinstance(given, Tensor):
        return f"a {type(given).__name__}"
    return f"{str(given.dtype).removeprefix('torch.')} {list(given.shape)}"
