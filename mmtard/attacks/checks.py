"""Whether a robust accuracy can be believed: lines of PASS, WARN and FAIL about the attacks that gave it.

    lines = health.check([(settings, facts), ...])                       # one pair for each eps of a dataset; costs nothing
    lines += health.sanity(model, images, labels, seeds, settings)       # attacks of its own, on a small fixed subset
    health.failed(lines)

A line is {"check", "status", "detail"}. FAIL: the numbers are wrong (the attack left its ball or the range, NaN). WARN: the attack may be
weaker than it looks, so that the accuracy is only an upper bound (Carlini et al. 2019, "On evaluating adversarial robustness").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..seeding import sample_uniform
from . import registry
from .batching import AdaptiveBatchSize
from .ensemble import AttackFacts, check_images
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


def failed(lines: Sequence[dict]) -> bool:
    """Whether any line is a hard failure: the command must exit non-zero."""
    return any(line["status"] == "FAIL" for line in lines)


def _of_one_eps(settings: AttackSettings, facts: AttackFacts) -> list[dict]:
    eps = settings.eps
    at = f"eps {eps:.4g}: "
    inside = facts.largest_perturbation <= eps * (1 + 1e-5) + 1e-7
    lines = [
        health_line("largest perturbation", inside, f"{at}{facts.largest_perturbation:.6g} in {settings.norm}", "FAIL"),
        health_line(
            "range",
            facts.lowest_pixel >= 0 and facts.highest_pixel <= 1,
            f"{at}pixels from {facts.lowest_pixel:.4g} to {facts.highest_pixel:.4g}",
            "FAIL",
        ),
        health_line(
            "NaN",
            facts.not_finite == 0,
            f"{at}{facts.not_finite} of {facts.n} samples with NaN or infinite logits or pixels",
            "FAIL",
        ),
    ]
    for loss, zeros in (("cross-entropy", facts.zero_gradient_ce), ("DLR", facts.zero_gradient_dlr)):
        if zeros is not None:
            lines.append(
                health_line(f"zero gradient of {loss}", zeros == 0, f"{at}{zeros} of {facts.attacked} attacked samples")
            )
    lines.append(
        health_line(
            "later forward pass",
            facts.taken_back <= _slack(facts.n),
            f"{at}classifies {facts.taken_back} of {sum(facts.broken.values())} broken samples correctly; they count as broken",
        )
    )
    ran = list(facts.broken)
    for i, name in enumerate(ran):
        if name not in registry.WHITE_BOX and any(earlier in registry.WHITE_BOX for earlier in ran[:i]):
            extra = facts.broken[name]
            lines.append(
                health_line(
                    f"{name} not stronger than white-box",
                    extra <= _slack(facts.n),
                    f"{at}it broke {extra} of {facts.n} samples that the gradient left standing",
                )
            )
    if facts.skipped:
        lines.append(
            health_line(
                "every attack ran",
                False,
                at + "; ".join(f"{name} left out: {reason}" for name, reason in facts.skipped.items()),
            )
        )
    return lines


def sanity(
    model: Classifier, images: Tensor, labels: Tensor, seeds: Tensor, settings: AttackSettings, source: Classifier | None = None, halving: AdaptiveBatchSize | None = None
) -> list[dict]:  # fmt: skip
    """The lines that need attacks of their own: APGD of at most 20 steps on cross-entropy, then DLR; and Square of 300 queries.

    On the first 64 correctly classified of the samples given: at most 160 forward and backward passes of them, 300 forward passes
    for Square, and some 7 passes of each sample alone and in eights; no more at once than `halving` allows. Raises UserError as
    `suite.run` does.
    """
    check_images(images)
    halving = AdaptiveBatchSize(SANITY_SAMPLES) if halving is None else halving
    with torch.no_grad():
        logits = torch.cat(halving(lambda x: logits_of(model, x), [images]))
    rows = (logits.argmax(1) == labels).nonzero().flatten()[:SANITY_SAMPLES]
    if not len(rows):
        return [health_line("sanity", False, "no sample is classified correctly: nothing to attack")]
    images, labels, seeds, n = images[rows], labels[rows], seeds[rows], len(rows)
    base = replace(settings, iters=min(settings.iters, _SANITY_ITERS), restarts=1, queries=_SANITY_QUERIES)

    gradient = ["apgd-ce"] + ["apgd-dlr"] * (registry.not_defined("apgd-dlr", logits.shape[1]) is None)

    def broken(attacks=("apgd-ce",), **changes) -> Tensor:
        return _broken(model, images, labels, seeds, attacks, replace(base, **changes), halving, source)

    steps = [k for k in (1, 5) if k < base.iters] + [base.iters]
    by_steps = {"0 steps": n} | {f"{k} steps": n - int(broken(iters=k).sum()) for k in steps}
    by_eps = {f"{f * base.eps:.4g}": n - int(broken(eps=f * base.eps).sum()) for f in (0.5, 1, 2)}
    white = broken(gradient)
    large = LARGE_EPS if base.norm == "linf" else LARGE_EPS * images[0].numel() ** 0.5
    left = 1 - float(broken(gradient, eps=large).float().mean())
    lines = [
        _monotone("monotone in steps", by_steps, n),
        _monotone("monotone in eps, half to double", by_eps, n),
        health_line("near zero at 64/255", left <= _NEAR_ZERO, f"{100 * left:.1f} % of {n} samples stand"),
        _weaker("random noise", _noise(model, images, labels, seeds, base, halving), white),
    ]
    if base.norm == "linf":
        lines.append(_weaker("square", broken(["square"]), white))
    if source is not None:
        lines.append(_weaker("transfer", broken(["transfer"]), white))
    return [*lines, _batch_size(model, images, labels, seeds, replace(base, iters=min(base.iters, 5)), halving)]


def _broken(
    model: Classifier, images: Tensor, labels: Tensor, seeds: Tensor, attacks: Sequence[str], settings: AttackSettings, halving: AdaptiveBatchSize, source: Classifier | None = None
) -> Tensor:  # fmt: skip
    def attack(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        state = AttackState(model, x, y, s, settings, source)
        for name in attacks:
            registry.find_attack(name)(state)
        return state.broken

    return torch.cat(halving(attack, [images, labels, seeds]))


def _noise(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    seeds: Tensor,
    settings: AttackSettings,
    halving: AdaptiveBatchSize,
) -> Tensor:
    signs = (sample_uniform(seeds, images.shape[1:]) < 0.5).float() * 2 - 1
    scale = settings.eps if settings.norm == "linf" else settings.eps / images[0].numel() ** 0.5
    with torch.no_grad():
        noisy = project(images + scale * signs, images, settings.norm, settings.eps)
        return torch.cat(halving(lambda x: logits_of(model, x).argmax(1), [noisy])) != labels


def _batch_size(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    seeds: Tensor,
    settings: AttackSettings,
    halving: AdaptiveBatchSize,
) -> dict:
    """The logits and the flags of each sample alone, in eights and in sixty-fours, as far as `halving` allows them."""
    flags, logits = {}, {}
    for size in sorted({min(size, halving.limit) for size in _BATCHES}):
        parts = [slice(i, i + size) for i in range(0, len(images), size)]
        try:
            with torch.no_grad():
                logits[size] = torch.cat(
                    [z for p in parts for z in halving(lambda x: logits_of(model, x), [images[p]])]
                )
            flags[size] = torch.cat(
                [_broken(model, images[p], labels[p], seeds[p], ["apgd-ce"], settings, halving) for p in parts]
            )
        except ValueError as error:  # batch norm in training mode refuses a batch of one
            return health_line("batch size", False, f"the model fails on batches of {size}: {error}")
    gap = max(float((z - logits[1]).abs().max()) for z in logits.values()) / max(float(logits[1].abs().max()), 1e-30)
    differ = sum(int((broken != flags[1]).sum()) for broken in flags.values())
    counts = ", ".join(f"{int(broken.sum())} at {size}" for size, broken in flags.items())
    return health_line(
        "batch size",
        gap <= _SAME_LOGITS and differ <= _slack(len(images)),
        f"broken of {len(images)}: {counts}; logits differ by {gap:.1e} of their size",
    )


def _weaker(name: str, broken: Tensor, white: Tensor) -> dict:
    extra, n = int((broken & ~white).sum()), len(white)
    return health_line(
        f"{name} weaker than the attack",
        extra <= max(1, n // 20),
        f"of {n} samples it broke {int(broken.sum())}, the attack {int(white.sum())}, it alone {extra}",
    )


def _monotone(name: str, standing: dict[str, int], n: int) -> dict:
    counts = list(standing.values())
    ok = all(after <= before + _slack(n) for before, after in zip(counts, counts[1:]))
    return health_line(name, ok, "standing: " + ", ".join(f"{count} at {key}" for key, count in standing.items()))


def _slack(n: int) -> int:
    """Samples that may go the wrong way by chance: another start finds what the first did not."""
    return max(1, n // 500)


def health_line(name: str, ok: bool, detail: str, otherwise: str = "WARN") -> dict:
    return {"check": name, "status": "PASS" if ok else otherwise, "detail": detail}
