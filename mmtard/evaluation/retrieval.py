"""Image-text retrieval of one dataset with captions: recall at 1, 5, 10 in both directions, clean and with attacked images."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..attacks import checks
from ..attacks.apgd import apgd
from ..attacks.ensemble import AttackFacts
from ..attacks.threat_model import perturbation_size
from ..config import show_pixels
from ..data.dataset import Dataset
from ..data.reader import Reader
from ..data.staging import staging_for
from ..errors import UserError
from ..seeding import derive_seeds
from . import results
from .chunks import ChunkedWork
from .partial_results import PartialResults
from .protocols import Protocol
from .statistics import stratified
from .zeroshot import attack_settings

K = (1, 5, 10)
ATTACK = "apgd on -log of the softmax mass of an image's own captions, among the captions of all measured images"
CERTAIN = ("largest perturbation", "range", "NaN")  # of the health lines, those that do not speak of classes


@dataclass
class Captions:
    """The captions of some images: `texts` [T] and the place, among the images, of the one that each describes: int64 [T]."""

    texts: list[str]
    image: Tensor

    @classmethod
    def read(cls, dataset: Dataset, ids: list[int], cache) -> Captions:
        """Each line of a sample's .txt is a caption. Raises UserError naming a sample without any."""
        reader = Reader(dataset, staging_for(dataset, cache))
        lines = [[line.strip() for line in reader.caption(i).splitlines() if line.strip()] for i in ids]
        for i, own in zip(ids, lines):
            if not own:
                raise UserError(f"'{dataset.name(i)}' has no caption; retrieval needs a .txt member beside each image")
        return cls(sum(lines, []), torch.tensor([place for place, own in enumerate(lines) for _ in own]))


def measure(
    work: ChunkedWork,
    embed: Callable[[Tensor], Tensor],
    texts: Callable[[list[str]], Tensor],
    logit_scale: float,
    protocol: Protocol,
    name: str,
    progress: PartialResults,
) -> dict:
    """Clean recall over all images, and clean and attacked recall over the sampled ones with their captions. Collective.

    embed: images [B,3,H,W] -> embeddings [B,D], differentiable; texts: T captions -> normalised embeddings [T,D].
    """

    def clean_chunk(images, batch, asked):
        with torch.no_grad():
            return {"embeddings": _pack(torch.cat(work.halving(embed, [images])))}

    asked_for = np.arange(len(work.dataset))
    rows, left_out = work.measure(
        f"{name} clean", asked_for, progress, clean_chunk, need_labels=False, max_left_out=work.max_left_out
    )
    everyone = np.array([i for row in rows for i in row["ids"]])
    of_all, all_captions = _embeddings(rows), Captions.read(work.dataset, everyone.tolist(), work.cache)
    text = texts(all_captions.texts)
    chosen = stratified(np.zeros(len(everyone), dtype=np.int64), protocol.n_samples, protocol.seed)  # of everyone's
    ids = everyone[chosen]
    captions = Captions.read(work.dataset, ids.tolist(), work.cache)
    own_text = text[torch.isin(all_captions.image, torch.from_numpy(chosen))]  # both in the order of the images
    place = {int(i): k for k, i in enumerate(ids)}
    targets, of_caption = own_text.to(work.ranks.device), captions.image.to(work.ranks.device)
    clean_ranks = ranks_of(of_all[torch.from_numpy(chosen)], own_text, captions.image)
    eps_out, samples, lines = {}, {}, results.unread(left_out, len(asked_for))
    for eps in protocol.radii(name):
        settings = attack_settings(protocol, float(eps))

        def attack_chunk(images, batch, asked):
            def attack(x, s, own):
                return _attack(lambda z: away(logit_scale * embed(z) @ targets.T, own), x, s, settings)

            began = time.monotonic()
            own = torch.tensor([place[i] for i in asked], device=images.device)[:, None] == of_caption[None, :]
            adv = torch.cat(work.halving(attack, [images, batch.seeds.to(images.device), own]))
            with torch.no_grad():
                z = torch.cat(work.halving(embed, [adv]))
            facts = {
                "largest": float(perturbation_size(adv - images, settings.norm).max()), "low": float(adv.min()), "high": float(adv.max()),
                "not_finite": int((~z.isfinite().all(1)).sum()), "seconds": time.monotonic() - began,
            }  # fmt: skip
            return {"embeddings": _pack(z), "facts": facts}

        found, _ = work.measure(f"{name} {show_pixels(eps)}", ids, progress, attack_chunk, need_labels=False)
        ranks, facts = ranks_of(_embeddings(found), own_text, captions.image), [row["facts"] for row in found]
        eps_out[show_pixels(eps)] = {"recall": recalls(*ranks), "seconds": round(sum(f["seconds"] for f in facts), 3)}
        samples[show_pixels(eps)] = _per_sample(*ranks)
        lines += _health(settings, facts, len(ids))
    return {
        "n_total": len(everyone),
        "captions": len(all_captions.texts),
        "attack": ATTACK,
        "left_out": len(left_out),
        "clean_all": recalls(*ranks_of(of_all, text, all_captions.image)),
        "clean": recalls(*clean_ranks),
        "eps": eps_out,
        "samples": {
            "ids": ids.tolist(),
            "keys": [work.dataset.keys[i] for i in ids.tolist()],
            "clean": _per_sample(*clean_ranks),
            "eps": samples,
        },
        "health": lines,
    }


def away(logits: Tensor, own: Tensor) -> Tensor:
    """The loss that pulls images from their captions: -log of the probability that the softmax over all captions gives an image's own.

    logits [B,T] = scale * cosines, own bool [B,T] -> [B]; with one caption an image, the cross-entropy of CLIP's own training.
    """
    return logits.logsumexp(1) - logits.masked_fill(~own, -torch.inf).logsumexp(1)


def ranks_of(images: Tensor, texts: Tensor, image_of: Tensor, block: int = 1024) -> tuple[Tensor, Tensor]:
    """(for each image, the rank of its best caption among all; for each caption, the rank of its image): 1 is found first.

    images [N,D], texts [T,D] normalised, image_of int64 [T], in the images' order. A tie counts against the model: one embedding
    for everything finds nothing, nor does NaN.
    """
    z = F.normalize(images, dim=1)
    own = torch.cat([_own(z, texts, image_of, i, block) for i in range(0, len(z), block)])  # [T]
    best = torch.full((len(z),), -torch.inf).scatter_reduce(0, image_of, own, "amax")
    of_image = torch.empty(len(z), dtype=torch.int64)
    of_caption = torch.ones(len(texts), dtype=torch.int64)
    for i in range(0, len(z), block):
        similarity, here = _similarity(z[i : i + block], texts), torch.arange(i, min(i + block, len(z)))
        other = image_of[None, :] != here[:, None]
        of_image[here] = 1 + ((similarity >= best[here, None]) & other).sum(1)
        of_caption += ((similarity >= own[None, :]) & other).sum(0)
    return of_image, of_caption


def _own(images: Tensor, texts: Tensor, image_of: Tensor, start: int, block: int) -> Tensor:
    """Similarity of each caption of a block of images to its image, from the very product that the others are compared in."""
    at = ((image_of >= start) & (image_of < start + block)).nonzero().flatten()
    return _similarity(images[start : start + block], texts)[image_of[at] - start, at]


def _similarity(images: Tensor, texts: Tensor) -> Tensor:
    """Cosines [N,T]; those that are NaN are lowest."""
    similarity = images @ texts.T
    return similarity.masked_fill(similarity.isnan(), -torch.inf)


def recalls(of_image: Tensor, of_caption: Tensor) -> dict:
    """recall@k, each an ACC, in both directions."""
    directions = {"image_to_text": of_image, "text_to_image": of_caption}
    return {name: {str(k): results.accuracy((ranks <= k).tolist()) for k in K} for name, ranks in directions.items()}


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


def _health(settings, facts: list[dict], n: int) -> list[dict]:
    merged = AttackFacts(
        n=n, attacked=n, largest_perturbation=max(f["largest"] for f in facts), lowest_pixel=min(f["low"] for f in facts),
        highest_pixel=max(f["high"] for f in facts), not_finite=sum(f["not_finite"] for f in facts), zero_gradient_ce=0,
        zero_gradient_dlr=None, taken_back=0, broken={}, seconds={}, queries={}, skipped={},
    )  # fmt: skip
    return [line for line in checks.check([(settings, merged)]) if line["check"] in CERTAIN]


def _per_sample(of_image: Tensor, of_caption: Tensor) -> dict:
    return {"image_to_text_rank": of_image.tolist(), "text_to_image_rank": of_caption.tolist()}


def _pack(z: Tensor) -> dict:
    return {"shape": list(z.shape), "float32": base64.b64encode(z.detach().float().cpu().numpy().tobytes()).decode()}


def _embeddings(rows: list[dict]) -> Tensor:
    parts = [
        np.frombuffer(base64.b64decode(r["embeddings"]["float32"]), dtype=np.float32).reshape(r["embeddings"]["shape"])
        for r in rows
    ]
    return torch.from_numpy(np.concatenate(parts))
