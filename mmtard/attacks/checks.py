"""Whether a robust accuracy can be believed: lines of PASS, WARN and FAIL about the attacks that gave it.

    lines = checks.check([(settings, facts), ...])                  # one pair for each eps of a dataset; costs nothing
    lines += checks.sanity(model, images, labels, seeds, settings)  # attacks of its own, on a small fixed subset
    checks.failed(lines)

A line is {"check", "status", "detail"}. FAIL: the numbers are wrong (the attack left its ball or the range, NaN).
WARN: the attack may be weaker than it looks, so that the accuracy is only an upper bound (Carlini et al. 2019, "On
evaluating adversarial robustness").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import losses
from ..seeding import sample_uniform
from . import registry
from .batching import AdaptiveBatchSize
from .ensemble import AttackFacts
from .inputs import check_images
from .state import AttackSettings, AttackState, Classifier, logits_of
from .threat_model import project

LARGE_EPS = 64 / 255  # no classifier of natural images stands this in L-inf
SANITY_SAMPLES = 64
_SANITY_ITERS, _SANITY_QUERIES = 20, 300
_BATCHES = (1, 8, 64)
_SAME_LOGITS = 1e-3  # of their largest size: float32 and another order of sums give 1e-6, TF32 1e-4
_NEAR_ZERO = 0.05


def check(runs: Sequence[tuple[AttackSettings, AttackFacts]]) -> list[dict]:
    """The lines that follow from what the attacks already did, for the sizes of eps of one dataset."""
    lines = [line for settings, facts in runs for line in _of_one_eps(settings, facts)]
    ordered = sorted(runs, key=lambda run: run[0].eps)
    if len(ordered) > 1:
        robust = {f"{settings.eps:.4g}": facts.attacked - sum(facts.broken.values()) for settings, facts in ordered}
        lines.append(_monotone("monotone in eps", robust, ordered[0][1].n))
    return lines


def nothing_attacked(facts: AttackFacts) -> list[dict]:
    """A line where every image is wrong without attack: no attack was tried, so that nothing speaks for the model."""
    if facts.attacked:
        return []
    detail = (
        f"the model is right on none of {facts.n} images; are labels, classes and preprocessing those of the model?"
    )
    return [health_line("something to attack", False, detail)]


def failed(lines: Sequence[dict]) -> bool:
    """Whether any line is a hard failure: the command must exit non-zero."""
    return any(line["status"] == "FAIL" for line in lines)


def finite_logits(not_finite: int, n: int) -> dict:
    """The line about the pass on clean images: how many of n samples have NaN or infinite logits.

    `losses.predicted_class` gives those NO_CLASS (-1): they are predicted as nothing, and count as wrong.
    """
    detail = f"{not_finite} of {n} clean images with NaN or infinite logits"
    return health_line("finite logits", not_finite == 0, detail + "; they count as wrong" * (not_finite > 0), "FAIL")


def _of_one_eps(settings: AttackSettings, facts: AttackFacts) -> list[dict]:
    at = f"eps {settings.eps:.4g}: "
    return [
        *_hard_lines(at, settings, facts),
        *_gradient_lines(at, facts),
        *_black_box_lines(at, facts),
        *_skipped_lines(at, facts),
    ]


def _hard_lines(at: str, settings: AttackSettings, facts: AttackFacts) -> list[dict]:
    inside = facts.largest_perturbation <= settings.eps * (1 + 1e-5) + 1e-7
    size = f"{at}{facts.largest_perturbation:.6g} in {settings.norm}"
    in_range = facts.lowest_pixel >= 0 and facts.highest_pixel <= 1
    pixels = f"{at}pixels from {facts.lowest_pixel:.4g} to {facts.highest_pixel:.4g}"
    not_finite = f"{at}{facts.not_finite} of {facts.n} samples with NaN or infinite logits or pixels"
    return [
        health_line("largest perturbation", inside, size, "FAIL"),
        health_line("range", in_range, pixels, "FAIL"),
        health_line("NaN", facts.not_finite == 0, not_finite, "FAIL"),
    ]


def _gradient_lines(at: str, facts: AttackFacts) -> list[dict]:
    lines = [
        health_line(f"zero gradient of {loss}", zeros == 0, f"{at}{zeros} of {facts.attacked} attacked samples")
        for loss, zeros in (("cross-entropy", facts.zero_gradient_ce), ("DLR", facts.zero_gradient_dlr))
        if zeros is not None
    ]
    broken = sum(facts.broken.values())
    detail = f"{at}classifies {facts.taken_back} of {broken} broken samples correctly; they count as broken"
    return [*lines, health_line("later forward pass", facts.taken_back <= _slack(facts.n), detail)]


def _black_box_lines(at: str, facts: AttackFacts) -> list[dict]:
    """An attack without the model's own gradient should find little that the gradient did not."""
    lines, ran = [], list(facts.broken)
    for i, name in enumerate(ran):
        if name not in registry.WHITE_BOX and any(earlier in registry.WHITE_BOX for earlier in ran[:i]):
            extra = facts.broken[name]
            detail = f"{at}it broke {extra} of {facts.n} samples that the gradient left standing"
            lines.append(health_line(f"{name} not stronger than white-box", extra <= _slack(facts.n), detail))
    return lines


def _skipped_lines(at: str, facts: AttackFacts) -> list[dict]:
    if not facts.skipped:
        return []
    left_out = "; ".join(f"{name} left out: {reason}" for name, reason in facts.skipped.items())
    return [health_line("every attack ran", False, at + left_out)]


def sanity(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    seeds: Tensor,
    settings: AttackSettings,
    source: Classifier | None = None,
    halving: AdaptiveBatchSize | None = None,
) -> list[dict]:
    """The lines that need attacks of their own, on the first 64 correctly classified of the samples given.

    APGD of at most 20 steps on cross-entropy, then DLR; and Square of 300 queries: at most 160 forward and backward
    passes of the samples, 300 forward passes for Square, and some 7 passes of each sample alone and in eights; no
    more at once than `halving` allows. Raises UserError as `run_attacks` does.
    """
    check_images(images)
    halving = AdaptiveBatchSize(SANITY_SAMPLES) if halving is None else halving
    with torch.no_grad():
        logits = torch.cat(halving(lambda x: logits_of(model, x), [images]))
    rows = losses.top1(logits, labels).nonzero().flatten()[:SANITY_SAMPLES]
    if not len(rows):
        return [health_line("sanity", False, "no sample is classified correctly: nothing to attack")]
    victim = _Victim(model, images[rows], labels[rows], seeds[rows], halving, source)
    base = replace(settings, iters=min(settings.iters, _SANITY_ITERS), restarts=1, queries=_SANITY_QUERIES)
    gradient = ["apgd-ce"] + ["apgd-dlr"] * (registry.not_defined("apgd-dlr", logits.shape[1]) is None)
    white = victim.broken(gradient, base)
    lines = [*_more_is_stronger(victim, gradient, base), _weaker("random noise", _noise(victim, base), white)]
    if base.norm == "linf":
        lines.append(_weaker("square", victim.broken(["square"], base), white))
    if source is not None:
        lines.append(_weaker("transfer", victim.broken(["transfer"], base), white))
    return [*lines, _batch_size(victim, replace(base, iters=min(base.iters, 5)))]


@dataclass(frozen=True)
class _Victim:
    """A model and the samples that `sanity` attacks, no more of them at once than `halving` allows."""

    model: Classifier
    images: Tensor
    labels: Tensor
    seeds: Tensor
    halving: AdaptiveBatchSize
    source: Classifier | None

    def broken(self, attacks: Sequence[str], settings: AttackSettings, part: slice = slice(None)) -> Tensor:
        """Which of the samples fall to the attacks: bool [n]."""

        def attack(images: Tensor, labels: Tensor, seeds: Tensor) -> Tensor:
            state = AttackState(self.model, images, labels, seeds, settings, self.source)
            for name in attacks:
                state.start = 0
                registry.find_attack(name)(state)
            return state.broken

        return torch.cat(self.halving(attack, [self.images[part], self.labels[part], self.seeds[part]]))

    def logits(self, part: slice = slice(None)) -> Tensor:
        """The logits of the samples, [n,C], without gradient."""
        with torch.no_grad():
            return torch.cat(self.halving(lambda x: logits_of(self.model, x), [self.images[part]]))


def _more_is_stronger(victim: _Victim, gradient: Sequence[str], base: AttackSettings) -> list[dict]:
    """More steps and larger balls break more, and a very large ball nearly all."""
    n = len(victim.images)

    def standing(settings: AttackSettings) -> int:
        return n - int(victim.broken(["apgd-ce"], settings).sum())

    steps = [k for k in (1, 5) if k < base.iters] + [base.iters]
    by_steps = {"0 steps": n} | {f"{k} steps": standing(replace(base, iters=k)) for k in steps}
    # An L-inf ball of radius 1 already holds every image.
    radii = [f * base.eps if base.norm == "l2" else min(1.0, f * base.eps) for f in (0.5, 1, 2)]
    by_eps = {f"{eps:.4g}": standing(replace(base, eps=eps)) for eps in radii}
    large = LARGE_EPS if base.norm == "linf" else LARGE_EPS * victim.images[0].numel() ** 0.5
    left = 1 - float(victim.broken(gradient, replace(base, eps=large)).float().mean())
    return [
        _monotone("monotone in steps", by_steps, n),
        _monotone("monotone in eps, half to double", by_eps, n),
        health_line("near zero at 64/255", left <= _NEAR_ZERO, f"{100 * left:.1f} % of {n} samples stand"),
    ]


def _noise(victim: _Victim, settings: AttackSettings) -> Tensor:
    """Which of the samples fall to random signs of size eps: bool [n]."""
    images = victim.images
    signs = (sample_uniform(victim.seeds, images.shape[1:]) < 0.5).float() * 2 - 1
    scale = settings.eps if settings.norm == "linf" else settings.eps / images[0].numel() ** 0.5
    noisy = project(images + scale * signs, images, settings.norm, settings.eps)
    prediction = losses.predicted_class(replace(victim, images=noisy).logits())
    return (prediction != victim.labels) & (prediction != losses.NO_CLASS)


def _batch_size(victim: _Victim, settings: AttackSettings) -> dict:
    """The logits and the flags of each sample alone, in eights and in sixty-fours, as far as `halving` allows them."""
    flags: dict[int, Tensor] = {}
    logits: dict[int, Tensor] = {}
    n = len(victim.images)
    for size in sorted({min(size, victim.halving.limit) for size in _BATCHES}):
        parts = [slice(i, i + size) for i in range(0, n, size)]
        try:
            logits[size] = torch.cat([victim.logits(part) for part in parts])
            flags[size] = torch.cat([victim.broken(["apgd-ce"], settings, part) for part in parts])
        except ValueError as error:  # batch norm in training mode refuses a batch of one
            return health_line("batch size", False, f"the model fails on batches of {size}: {error}")
    gap = max(float((z - logits[1]).abs().max()) for z in logits.values()) / max(float(logits[1].abs().max()), 1e-30)
    differ = sum(int((broken != flags[1]).sum()) for broken in flags.values())
    counts = ", ".join(f"{int(broken.sum())} at {size}" for size, broken in flags.items())
    detail = f"broken of {n}: {counts}; logits differ by {gap:.1e} of their size"
    return health_line("batch size", gap <= _SAME_LOGITS and differ <= _slack(n), detail)


def _weaker(name: str, broken: Tensor, white: Tensor) -> dict:
    extra, n = int((broken & ~white).sum()), len(white)
    detail = f"of {n} samples it broke {int(broken.sum())}, the attack {int(white.sum())}, it alone {extra}"
    return health_line(f"{name} weaker than the attack", extra <= max(1, n // 20), detail)


def _monotone(name: str, standing: dict[str, int], n: int) -> dict:
    counts = list(standing.values())
    ok = all(after <= before + _slack(n) for before, after in zip(counts, counts[1:]))
    return health_line(name, ok, "standing: " + ", ".join(f"{count} at {key}" for key, count in standing.items()))


def _slack(n: int) -> int:
    """Samples that may go the wrong way by chance: another start finds what the first did not."""
    return max(1, n // 500)


def health_line(name: str, ok: bool, detail: str, otherwise: str = "WARN") -> dict:
    """One line of a health section: PASS where `ok`, else `otherwise`, WARN or FAIL."""
    return {"check": name, "status": "PASS" if ok else otherwise, "detail": detail}
