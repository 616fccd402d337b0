"""Image-text retrieval of one dataset with captions.

Recall at 1, 5 and 10 in both directions, clean and with attacked images.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..attacks import checks
from ..attacks.apgd import apgd
from ..attacks.checks import health_line
from ..attacks.ensemble import AttackFacts
from ..attacks.state import AttackSettings
from ..attacks.threat_model import perturbation_size
from ..config import show_pixels
from ..data.dataset import Dataset
from ..data.samples import Batch
from ..seeding import derive_seeds
from . import results
from .at_radius import attack_settings
from .chunks import ChunkedWork
from .data_checks import caption_lines, not_used
from .partial_results import PartialResults
from .protocols import Protocol
from .recall import Captions, per_sample, ranks_of, recalls
from .statistics import stratified

ATTACK = "apgd on -log of the softmax mass of an image's own captions, among the captions of all measured images"
CERTAIN = ("largest perturbation", "range", "NaN")  # of the health lines, those that do not speak of classes


@dataclass(frozen=True)
class RetrievalTask:
    """One dataset of images with captions, and the model that matches them."""

    name: str
    work: ChunkedWork
    progress: PartialResults
    embed: Callable[[Tensor], Tensor]  # images [B,3,H,W] -> embeddings [B,D], differentiable
    embed_texts: Callable[[list[str]], Tensor]  # T captions -> normalised embeddings [T,D]; collective
    read_alike: Callable[[list[str]], list[tuple[str, str]]]  # pairs of different captions that are one to the model
    logit_scale: float
    protocol: Protocol


@dataclass(frozen=True)
class Sample:
    """The images that are attacked: their ids, their captions, and the captions' embeddings [T,D]."""

    ids: np.ndarray
    captions: Captions
    texts: Tensor


def measure(task: RetrievalTask) -> dict:
    """Recall over all images, and clean and attacked recall over the sampled ones with their captions. Collective."""
    work, dataset = task.work, task.work.dataset
    rows, left_out = work.measure(
        f"{task.name} clean",
        np.arange(len(dataset)),
        task.progress,
        partial(_clean_chunk, task),
        need_labels=False,
        max_left_out=work.max_left_out,
    )
    images = _embeddings(rows)
    read = np.array([i for row in rows for i in row["ids"]])
    captions = Captions.read(dataset, read.tolist(), work.cache)
    texts = task.embed_texts(captions.texts)
    alike = work.ranks.run_on_first(partial(task.read_alike, captions.texts))
    chosen = stratified(np.zeros(len(read), dtype=np.int64), task.protocol.n_samples, task.protocol.seed)
    own, theirs = captions.of(chosen)
    sample = Sample(read[chosen], own, texts[theirs])
    clean = ranks_of(images[torch.from_numpy(chosen)], sample.texts, own.image)
    at_radius = {show_pixels(eps): attack_at(task, sample, eps) for eps in task.protocol.radii(task.name)}
    health = [
        *results.unread(left_out, len(dataset)),
        *_not_finite(dataset, read, images, texts),
        *caption_lines(alike, len(captions.texts)),
    ]
    return {
        "n_total": len(read),
        "captions": len(captions.texts),
        "attack": ATTACK,
        "left_out": len(left_out),
        "not_used": not_used(dataset, left_out, labels=False),
        "clean_all": recalls(*ranks_of(images, texts, captions.image)),
        **_of_the_sample(sample, [dataset.keys[i] for i in sample.ids.tolist()], clean, at_radius),
        "health": [*health, *(line for found in at_radius.values() for line in found["health"])],
    }


def _of_the_sample(sample: Sample, keys: list[str], clean: tuple, at_radius: dict[str, dict]) -> dict:
    """What results.json holds of the images that were attacked, before and at each radius."""
    return {
        "clean": recalls(*clean),
        "eps": {eps: found["recall"] for eps, found in at_radius.items()},
        "samples": {
            "ids": sample.ids.tolist(),
            "keys": keys,
            "clean": per_sample(*clean),
            "eps": {eps: per_sample(*found["ranks"]) for eps, found in at_radius.items()},
        },
    }


def _clean_chunk(task: RetrievalTask, images: Tensor, batch: Batch, ids: list[int]) -> dict:
    with torch.no_grad():
        return {"embeddings": _pack(torch.cat(task.work.in_batches(task.embed, [images])))}


def attack_at(task: RetrievalTask, sample: Sample, eps: Fraction) -> dict:
    """Attack the sampled images at one radius: {recall: as results.json holds it, ranks, health}. Collective."""
    settings = attack_settings(task.protocol, float(eps))
    rows, _ = task.work.measure(
        f"{task.name} {show_pixels(eps)}",
        sample.ids,
        task.progress,
        partial(_attack_chunk, task, sample, settings),
        need_labels=False,
    )
    ranks, facts = ranks_of(_embeddings(rows), sample.texts, sample.captions.image), [row["facts"] for row in rows]
    seconds = round(sum(f["seconds"] for f in facts), 3)
    return {
        "recall": {"recall": recalls(*ranks), "seconds": seconds},
        "ranks": ranks,
        "health": _health(settings, facts, len(sample.ids)),
    }


def _attack_chunk(
    task: RetrievalTask, sample: Sample, settings: AttackSettings, images: Tensor, batch: Batch, ids: list[int]
) -> dict:
    """Attack the images of a chunk; its embeddings and facts."""
    began, device = time.monotonic(), images.device
    place = torch.from_numpy(np.searchsorted(sample.ids, ids)).to(device)
    own = place[:, None] == sample.captions.image.to(device)[None, :]
    texts = sample.texts.to(device)
    embed = task.work.interruption.heeding(task.embed)

    def attack(x: Tensor, seeds: Tensor, own: Tensor) -> Tensor:
        def loss(z: Tensor) -> Tensor:
            return away(task.logit_scale * embed(z) @ texts.T, own)

        return _attack(loss, x, seeds, settings)

    adv = torch.cat(task.work.in_batches(attack, [images, batch.seeds.to(device), own]))
    with torch.no_grad():
        z = torch.cat(task.work.in_batches(task.embed, [adv]))
    facts = {
        "largest": float(perturbation_size(adv - images, settings.norm).max()),
        "low": float(adv.min()),
        "high": float(adv.max()),
        "not_finite": int((~z.isfinite().all(1)).sum()),
        "seconds": time.monotonic() - began,
    }
    return {"embeddings": _pack(z), "facts": facts}


def _not_finite(dataset: Dataset, ids: np.ndarray, images: Tensor, texts: Tensor) -> list[dict]:
    """A line about embeddings that are NaN or infinite; none where all are finite."""
    bad = ids[~images.isfinite().all(1).numpy()].tolist()
    bad_texts = int((~texts.isfinite().all(1)).sum())
    if not bad and not bad_texts:
        return []
    first = f" ({dataset.name(bad[0])})" if bad else ""
    return [
        health_line(
            "finite embeddings",
            False,
            f"clean: {len(bad)} of {len(ids)} images{first} and {bad_texts} of {len(texts)} captions have embeddings "
            "that are NaN or infinite; they find nothing",
            "FAIL",
        )
    ]


def away(logits: Tensor, own: Tensor) -> Tensor:
    """The loss that pulls images from their captions.

    -log of the probability that the softmax over all captions gives an image's own. logits [B,T] = scale * cosines, own
    bool [B,T] -> [B]; with one caption an image, the cross-entropy of CLIP's own training.
    """
    return logits.logsumexp(1) - logits.masked_fill(~own, -torch.inf).logsumexp(1)


def _attack(loss_fn: Callable[[Tensor], Tensor], images: Tensor, seeds: Tensor, settings) -> Tensor:
    """The restart of largest loss, of each sample."""
    best = loss = None
    for restart in range(settings.restarts):
        adv = apgd(
            loss_fn,
            images,
            norm=settings.norm,
            eps=settings.eps,
            steps=settings.iters,
            seeds=derive_seeds(seeds, restart),
        )
        with torch.no_grad():
            now = loss_fn(adv)
        better = torch.ones_like(now, dtype=torch.bool) if loss is None else now > loss
        best = adv if best is None else torch.where(better.view(-1, 1, 1, 1), adv, best)
        loss = now if loss is None else torch.maximum(now, loss)
    return best


def _health(settings: AttackSettings, facts: list[dict], n: int) -> list[dict]:
    merged = AttackFacts(
        n=n,
        attacked=n,
        largest_perturbation=max(f["largest"] for f in facts),
        lowest_pixel=min(f["low"] for f in facts),
        highest_pixel=max(f["high"] for f in facts),
        not_finite=sum(f["not_finite"] for f in facts),
        zero_gradient_ce=0,
        zero_gradient_dlr=None,
        taken_back=0,
        broken={},
        seconds={},
        queries={},
        skipped={},
    )
    return [line for line in checks.check([(settings, merged)]) if line["check"] in CERTAIN]


def _pack(z: Tensor) -> dict:
    return {"shape": list(z.shape), "float32": base64.b64encode(z.detach().float().cpu().numpy().tobytes()).decode()}


def _embeddings(rows: list[dict]) -> Tensor:
    parts = [
        np.frombuffer(base64.b64decode(r["embeddings"]["float32"]), dtype=np.float32).reshape(r["embeddings"]["shape"])
        for r in rows
    ]
    return torch.from_numpy(np.concatenate(parts))
