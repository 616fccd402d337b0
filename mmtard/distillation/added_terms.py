"""The terms that a run adds to its method's loss, whichever method that is: anchor, feature, bound.

anchor, ours: weight * (1 - cos(P z_S(x), z_T(x))), which holds the student's clean embedding near a clean teacher's.
feature, ours: weight * (1 - cos(P z_S(x'), z_T(view))), of the image embedding, or the mean over places: the patches'
tokens of a ViT, the last map of a convolutional tower. P is a learned linear map (of a map, a 1x1 convolution), or none
where both have one width. bound: LORE's constraint, see `bound`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Config
from ..errors import UserError
from ..losses import squared_distance
from ..zero_shot import Prediction
from .learned import LearnedPart, LearnedParts, SampleMultipliers, multipliers, projection
from .methods import Pass, find_method

Predictions = dict[Pass, Prediction]
Named = dict[str, Tensor]  # a term's name -> [B]


def run_passes(config: Config) -> set[Pass]:
    """The (model, image) pairs that a training step computes: the method's, and those of the added terms."""
    passes, terms = set(find_method(config.method.name).passes(config.method)), config.terms
    if terms.anchor is not None:
        passes |= {Pass("student", "clean"), Pass(terms.anchor.teacher, "clean")}
    if terms.feature is not None:
        passes |= {Pass("student", "adv"), Pass(terms.feature.teacher, terms.feature.teacher_view)}
    if config.bound is not None:
        passes |= {Pass("student", "clean"), Pass("start", "clean")}
    return passes


def learned_parts(
    config: Config,
    widths: dict[str, int],
    device: torch.device | str = "cpu",
    samples: int = 0,
    places: dict[str, int] | None = None,
) -> LearnedParts:
    """What the added terms learn. widths: model -> the width of its embeddings; samples: of the whole data.

    places: model -> the width of its features of places; None: that of its embeddings.
    """
    parts, terms, bound = {}, config.terms, config.bound
    by_term = {"anchor": widths}
    by_term["feature"] = (places or widths) if terms.feature and terms.feature.of == "tokens" else widths
    table = None
    for name, term in (("anchor", terms.anchor), ("feature", terms.feature)):
        if term is None:
            continue
        source, target = by_term[name]["student"], by_term[name][term.teacher]
        if term.projection is False and source != target:
            raise UserError(
                f"terms.{name}.projection: false, but the student's features have {source} numbers and those of "
                f"teacher '{term.teacher}' {target}; leave it out"
            )
        if term.projection or source != target:
            parts[name] = LearnedPart(projection(source, target, config.seed, name).to(device), terms.projection_lr)
    if bound is not None and bound.multipliers == "sample":
        table = SampleMultipliers(samples, bound.rate, device)
    elif bound is not None:
        network = multipliers(widths["start"], bound.hidden, config.seed).to(device)
        parts["bound"] = LearnedPart(network, bound.rate, scheduled=False, every=bound.dual_every)
    return LearnedParts(parts, table)


def added_loss(
    config: Config, predictions: Predictions, learned: LearnedParts, samples: Tensor | None = None
) -> tuple[Tensor | float, Named]:
    """(what is added to the loss [B], each term without its weight); 0.0 and no term where none is set.

    samples: int64 [B], which of the data these are, for multipliers of their own.
    """
    total, named, terms = 0.0, {}, config.terms
    if terms.anchor is not None:
        named["anchor"] = anchor(terms.anchor, predictions, learned)
        total = total + terms.anchor.weight * named["anchor"]
    if terms.feature is not None:
        named["feature"] = feature(terms.feature, predictions, learned)
        total = total + terms.feature.weight * named["feature"]
    if config.bound is not None:
        added, of_bound = bound(config.bound, predictions, learned, samples)
        total, named = total + added, named | of_bound
    return total, named


def anchor(settings, predictions: Predictions, learned: LearnedParts) -> Tensor:
    """1 - cos(P z_S(x), z_T(x)) of each sample, [B]."""
    student = learned("anchor", predictions["student", "clean"].embeddings)
    return 1 - F.cosine_similarity(student, predictions[settings.teacher, "clean"].embeddings.detach(), dim=-1)


def feature(settings, predictions: Predictions, learned: LearnedParts) -> Tensor:
    """1 - cos(P z_S(x'), z_T(view)) of each sample, [B]; of tokens the mean over the student's places."""
    student, teacher = predictions["student", "adv"], predictions[settings.teacher, settings.teacher_view]
    if settings.of == "embedding":
        return 1 - F.cosine_similarity(learned("feature", student.embeddings), teacher.embeddings.detach(), dim=-1)
    places = on_grid_of(teacher.tokens.detach(), student.tokens.shape[1])
    return 1 - F.cosine_similarity(learned("feature", student.tokens), places, dim=-1).mean(1)


def on_grid_of(tokens: Tensor, places: int) -> Tensor:
    """Features [B,P,D] of a square grid, brought to a square grid of `places` by bilinear interpolation."""
    own = tokens.shape[1]
    if own == places:
        return tokens
    old, new = math.isqrt(own), math.isqrt(places)
    if old**2 != own or new**2 != places:
        raise UserError(
            f"terms.feature.of: the student's {places} places and the teacher's {own} are not both square grids; "
            "set terms.feature.of=embedding"
        )
    grid = tokens.transpose(1, 2).unflatten(2, (old, old))
    return F.interpolate(grid, (new, new), mode="bilinear", antialias=True).flatten(2).transpose(1, 2)


def bound(settings, predictions: Predictions, learned: LearnedParts, samples: Tensor | None) -> tuple[Tensor, Named]:
    """lambda(x) (||z_S(x) - z_0(x)||^2 - rho ||z_0(x)||^2), not normalised, lambda(x) >= 0.

    The student descends it and the multipliers lambda climb it. Khodabandeh et al., "LORE: Lagrangian-Optimized Robust
    Embeddings for Visual Encoders", arXiv 2505.18884, equations 5 and 7: lambda(x) = F(z_0(x)), F two layers of hidden
    width 512, rho .1, one step of F for every 5 of the student. There these 5 are on one batch; here each has its own,
    so that all methods see as many images. `multipliers: sample`, ours, is the problem before F stands in: a variable
    of each sample's own, which climbs by its excess in parts of ||z_0(x)||^2.
    """
    student, start = predictions["student", "clean"].embeddings, predictions["start", "clean"].embeddings.detach()
    distance, size = squared_distance(student, start), start.square().sum(-1)
    excess = distance - settings.rho * size
    if settings.multipliers == "sample":
        fixed = learned.samples(samples)
        learned.samples.note(samples, (excess / size).detach())
        return fixed * excess, {"bound_distance": distance / size, "w_bound": fixed}
    multiplier = learned("bound", start).squeeze(-1)
    fixed = multiplier.detach()
    climbs = (multiplier - fixed) * excess.detach()  # 0, with the network's gradient
    return fixed * excess - climbs, {"bound_distance": distance / size, "w_bound": fixed}
