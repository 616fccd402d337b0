"""An attack on plain tensors: what it made of them, what fell, and whether the result can be believed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UserError
from ..seeding import sample_seeds
from . import checks, ensemble
from .batching import AdaptiveBatchSize
from .inputs import check_count, check_images, check_per_sample
from .state import AttackSettings, Classifier


@dataclass(frozen=True)
class AttackResult:
    """What an attack found; tensors on the images' device.

    A sample that the model gets wrong without attack is not attacked: it is neither `fell` nor `robust`.
    """

    images: Tensor  # float32 [B,C,H,W]: the adversarial images; those that were not attacked, unchanged
    clean_prediction: Tensor  # int64 [B]: -1 where the model gives NaN or infinity
    prediction: Tensor  # int64 [B], of `images`, by the forward pass of the attack itself
    correct: Tensor  # bool [B]: classified correctly without attack
    fell: Tensor  # bool [B]: classified correctly without attack, and broken by it
    broken_by: list[str | None]  # the attack that each sample fell to
    health: list[dict]  # lines {"check", "status", "detail"}: PASS, WARN or FAIL
    facts: ensemble.AttackFacts

    @property
    def robust(self) -> Tensor:
        """bool [B]: classified correctly without attack and under it."""
        return self.correct & ~self.fell

    @property
    def clean_accuracy(self) -> float:
        """The share of samples that are classified correctly without attack, in [0,1]."""
        return float(self.correct.float().mean())

    @property
    def robust_accuracy(self) -> float:
        """The share of samples that are classified correctly without attack and under it, in [0,1]."""
        return float(self.robust.float().mean())

    @property
    def healthy(self) -> bool:
        """Whether every health line is PASS."""
        return all(line["status"] == "PASS" for line in self.health)

    def __str__(self) -> str:
        lines = [
            f"{line['status']} {line['check']}: {line['detail']}" for line in self.health if line["status"] != "PASS"
        ]
        head = f"{len(self.correct)} images: clean {self.clean_accuracy:.1%}, under attack {self.robust_accuracy:.1%}"
        return "\n".join([head, *(lines or [f"PASS {len(self.health)} of {len(self.health)} health checks"])])


def attack_tensors(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    settings: AttackSettings,
    names: Sequence[str],
    *,
    seed: int = 0,
    batch_size: int = 64,
    source: Classifier | None = None,
) -> AttackResult:
    """Run the attacks one after the other, each on what the earlier ones left standing, in batches.

    Each image's random numbers follow from `seed` and its place alone: the batch size changes no result, but for
    `autoattack`. Arguments and errors as of `run_attacks`.
    """
    check_images(images)
    check_per_sample(labels, images, "labels")
    check_count(batch_size, "batch_size")
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise UserError(f"seed: {seed!r} is not a whole number; write one such as 0")
    if "transfer" in names and source is None:
        raise UserError("source: 'transfer' follows the gradients of another model; give it: source=MODEL")
    if isinstance(model, nn.Module):
        _check_module(model, images)
    _check_l2_radius(settings, images)
    seeds = torch.from_numpy(sample_seeds(seed, 0, np.arange(len(images))).view(np.int64)).to(images.device)

    def run(x: Tensor, y: Tensor, s: Tensor) -> ensemble.Outcome:
        return ensemble.run_attacks(model, x, y, s, names, settings, source)

    with torch.inference_mode(False), torch.no_grad():
        # Tensors of an inference mode cannot take a gradient: their copies can.
        tensors = [images.detach().clone(), labels.clone(), seeds.clone()]
        outcomes: list[ensemble.Outcome] = AdaptiveBatchSize(batch_size)(run, tensors)
    return _joined(outcomes, settings, images.device)


def _joined(outcomes: list[ensemble.Outcome], settings: AttackSettings, device: torch.device) -> AttackResult:
    """The batches' outcomes as one. Raises UserError where no attack could run."""
    facts = ensemble.merge([outcome.facts for outcome in outcomes])
    if not facts.broken:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in facts.skipped.items())
        raise UserError(f"name: no attack is left ({reasons}); add 'apgd-ce'")
    broken_by = [name for outcome in outcomes for name in outcome.broken_by]
    return AttackResult(
        images=torch.cat([outcome.adv for outcome in outcomes]),
        clean_prediction=torch.cat([outcome.clean_prediction for outcome in outcomes]),
        prediction=torch.cat([outcome.prediction for outcome in outcomes]),
        correct=torch.cat([outcome.clean for outcome in outcomes]),
        fell=torch.tensor([name is not None for name in broken_by], device=device),
        broken_by=broken_by,
        health=[*checks.check([(settings, facts)]), *checks.nothing_attacked(facts)],
        facts=facts,
    )


def _check_l2_radius(settings: AttackSettings, images: Tensor) -> None:
    if settings.norm == "l2" and settings.eps >= 0.5 * images[0].numel() ** 0.5:
        raise UserError(
            f"eps: {settings.eps:g} in L2 turns any image of {'x'.join(map(str, images.shape[1:]))} pixels grey; "
            "write a size such as 0.5 or 128/255"
        )


def _check_module(model: nn.Module, images: Tensor) -> None:
    if model.training:
        raise UserError(
            "model: it is in training mode, in which its answers depend on the batch; call model.eval() first"
        )
    first = next(model.parameters(), None)
    if first is not None and first.device != images.device:
        raise UserError(f"images: on {images.device}, the model on {first.device}; write images.to('{first.device}')")
