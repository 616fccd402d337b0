"""What an attack maximises, by name: per-sample losses of the student's Prediction on the perturbed image.

`mmtard.config.ATTACK_OBJECTIVES` names them and the model whose clean-image prediction is the fixed target.
"""

from collections.abc import Callable

from torch import Tensor

from .errors import unknown
from .losses import cross_entropy, kl
from .methods import Pass, Prediction

AttackLoss = Callable[[Prediction], Tensor]

TARGETS = {"ce": None, "kl_clean": Pass("clean", "clean"), "kl_robust": Pass("robust", "clean"), "kl_self": Pass("student", "clean")}


def target_pass(name: str) -> Pass | None:
    """The prediction on clean images that the objective is measured against; None when labels suffice."""
    if name not in TARGETS:
        raise unknown("attack objective", name, TARGETS)
    return TARGETS[name]


def attack_loss(name: str, target: Prediction | None, labels: Tensor) -> AttackLoss:
    """The per-sample loss [B] that the attack maximises, as a function of the student's Prediction.

    `ce`: CE(p_S(x+d), y). `kl_clean`, `kl_robust`, `kl_self`: KL(p_M(x) || p_S(x+d)) with M the clean teacher, the robust
    teacher, or the student itself (TRADES); `target` is M's prediction on x.
    """
    if target_pass(name) is None:
        return lambda student: cross_entropy(student.logits, labels)
    fixed = target.logits.detach()
    return lambda student: kl(fixed, student.logits)
