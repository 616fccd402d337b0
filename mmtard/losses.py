"""Per-sample losses between two models, or between a model and labels. Pure functions of tensors."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each sample: logits [B,C], labels int64 [B] -> [B], in nats."""
    return F.cross_entropy(logits, labels, reduction="none")


def kl(teacher_logits: Tensor, student_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p_T || p_S) of each sample: logits [B,C] x2 -> [B], in nats, of softmax(logits / temperature).

    Hinton et al. 2015, without their factor temperature^2: the caller's equation says whether it applies.
    """
    log_p_t = F.log_softmax(teacher_logits / temperature, dim=-1)
    log_p_s = F.log_softmax(student_logits / temperature, dim=-1)
    return F.kl_div(log_p_s, log_p_t, reduction="none", log_target=True).sum(-1)


def kl_of_mean(teacher_logits: list[Tensor], weights: list[float], student_logits: Tensor) -> Tensor:
    """KL(sum_m w_m p_m || p_S) of each sample: logits [B,C] of each teacher, weights of sum 1 -> [B], in nats."""
    log_p = torch.stack([F.log_softmax(t, dim=-1) + math.log(w) for t, w in zip(teacher_logits, weights)]).logsumexp(0)
    return F.kl_div(F.log_softmax(student_logits, dim=-1), log_p, reduction="none", log_target=True).sum(-1)


def true_class(values: Tensor, labels: Tensor) -> Tensor:
    """The entry of each sample's own class: values [B,C], labels int64 [B] -> [B]."""
    return values.gather(1, labels[:, None]).squeeze(1)


def class_cosines(embeddings: Tensor, class_embeddings: Tensor) -> Tensor:
    """Cosines <z(x), t_k>: embeddings [B,D] of any length, class_embeddings [C,D] normalised -> [B,C]."""
    return F.normalize(embeddings, dim=-1) @ class_embeddings.T


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """||a - b||^2 of each sample: [B,D] x2, not normalised -> [B]."""
    return (a - b).square().sum(-1)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """z_y - max_{i != y} z_i of each sample: logits [B,C >= 2], labels int64 [B] -> [B]; negative where misclassified."""
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return true_class(logits, labels) - others.max(1).values


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio, -(z_y - max_{i != y} z_i) / (z_pi1 - z_pi3): logits [B,C >= 3], labels int64 [B] -> [B].

    Croce & Hein, ICML 2020, equation 6; z_pi1 >= z_pi2 >= ... are the sorted logits. Invariant to the logits' scale and shift.
    """
    z = logits.topk(3).values
    return -margin(logits, labels) / (z[:, 0] - z[:, 2] + 1e-12)


def targeted_dlr(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """-(z_y - z_t) / (z_pi1 - (z_pi3 + z_pi4) / 2) of each sample: logits [B,C >= 4], labels and targets int64 [B] -> [B].

    Croce & Hein, ICML 2020, equation 7; it rises as the target class gains on the label's.
    """
    z = logits.topk(4).values
    return (true_class(logits, targets) - true_class(logits, labels)) / (z[:, 0] - (z[:, 2] + z[:, 3]) / 2 + 1e-12)


def top1(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the highest logit is the label's: [B,C], [B] -> bool [B]."""
    return torch.eq(logits.argmax(-1), labels)
