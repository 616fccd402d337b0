"""The `quick` protocol: clean accuracy and PGD-20, zero-shot, in float32. For watching a run, never for a table in a paper."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from .. import data, losses, towers
from ..attacks import pgd
from ..config import Data, Model, show_pixels
from ..errors import RunError, UserError
from ..methods import Head
from ..parallel import Ranks
from ..preempt import Interruption
from .statistics import stratified, wilson_interval


@dataclass(frozen=True)
class Quick:
    """Settings of the protocol. The attack maximises cross-entropy with steps of 2.5 eps / steps from a random start."""

    eps: Fraction
    steps: int = 20
    norm: str = "linf"
    n_samples: int | None = None
    batch_size: int = 64
    seed: int = 0
    workers: int = 2

    @property
    def step_size(self) -> float:
        return 2.5 * float(self.eps) / self.steps


def evaluate(model: Model, source: Data, settings: Quick, ranks: Ranks, say=print, interruption: Interruption | None = None) -> dict:
    """Measure a model on labelled shards; the same result on every rank and, sample by sample, at every world size.

    Returns the accuracies as fractions with 95 % intervals, each sample's outcome, the health of the attack, and everything
    needed to repeat it. Collective. Raises UserError for a model or data that do not fit, RunError when the attack left the ball or
    a rank was interrupted.
    """
    ranks.from_first(lambda: data.open_dataset(source).fingerprint)
    dataset = data.open_dataset(source)
    names = data.classnames(source)
    if dataset.labels.max(initial=-1) >= len(names):
        raise UserError(f"data.classnames: {len(names)} names, but '{source.shards}' has label {dataset.labels.max()}; give the names of these labels")
    ids = stratified(dataset.labels, settings.n_samples, settings.seed)
    if not len(ids):
        raise UserError(f"'{source.shards}' has no labelled sample; evaluation needs a .cls member beside each image")
    clip = towers.load(model, where="model")
    classes = ranks.from_first(lambda: clip.class_embeddings(names, data.templates(source), ranks.device))
    head = Head(classes.to(ranks.device), clip.logit_scale)
    tower = clip.tower().eval().requires_grad_(False).to(ranks.device)
    mine = _measure(tower, head, source, dataset, ids, settings, ranks, say, Interruption() if interruption is None else interruption)
    rows = sorted(row for rank in ranks.gather(mine["rows"]) for row in rank)
    largest = max(ranks.gather(mine["largest"]))
    if largest > float(settings.eps) * (1 + 1e-5) + 1e-7:
        raise RunError(f"the attack left its ball: a perturbation of {largest} at eps {float(settings.eps)}; the accuracies would be wrong")
    return {
        "model": model.model_dump(mode="json"),
        "data": source.shards,
        "data_fingerprint": dataset.fingerprint,
        "protocol": "quick",
        "settings": {**asdict(settings), "eps": show_pixels(settings.eps), "step_size": settings.step_size},
        "prompts": data.templates(source),
        "logit_scale": head.logit_scale,
        "chance": 1 / len(names),
        "clean": _accuracy([r[1] for r in rows]),
        "pgd": _accuracy([r[2] for r in rows]),
        "health": {"largest_perturbation": largest, "zero_gradient_samples": sum(ranks.gather(mine["zero_gradient"])), "replaced": sum(ranks.gather(mine["replaced"]))},
        "samples": {"ids": [r[0] for r in rows], "clean": [r[1] for r in rows], "pgd": [r[2] for r in rows]},
    }


def _measure(tower, head: Head, source: Data, dataset, everyone: np.ndarray, settings: Quick, ranks: Ranks, say, interruption: Interruption) -> dict:
    ids, longest = everyone[ranks.rank :: ranks.world_size], everyone[:: ranks.world_size]
    rounds = -(-len(longest) // settings.batch_size)  # the same on every rank, so that all agree on an interruption equally often
    rows, largest, zero_gradient, replaced, began = [], 0.0, 0, 0, time.monotonic()
    done, said = 0, began
    staging = data.Staging(dataset, source.cache) if dataset.remote else None
    batches = data.eval_batches(
        dataset, data.Transform(tower.image_size), ids, settings.batch_size, settings.seed, settings.workers, staging=staging
    )
    for _, batch in zip_longest(range(rounds), batches):
        interruption.stop(ranks)
        if batch is None:
            continue
        images = batch.images.to(ranks.device).float() / 255
        labels, seeds = batch.labels.to(ranks.device), batch.seeds.to(ranks.device)
        with torch.no_grad():
            clean = losses.top1(head(tower(images)).logits, labels)
        robust = torch.zeros_like(clean)
        if clean.any():  # a sample that is wrong without attack is wrong under it
            x, y = images[clean], labels[clean]
            adv, zeros = _attack(tower, head, x, y, seeds[clean], settings)
            with torch.no_grad():
                robust[clean] = losses.top1(head(tower(adv)).logits, y)
            largest = max(largest, _size(adv - x, settings.norm))
            zero_gradient += zeros
        rows += zip(batch.sample_ids.tolist(), clean.tolist(), robust.tolist())
        done, replaced = done + len(labels), replaced + len(batch.replaced)
        if ranks.first and time.monotonic() - said > 10:
            said = time.monotonic()
            rate = done / (said - began)
            say(f"{done}/{len(ids)} samples of this rank  {rate * ranks.world_size:.3g} images/s  left {(len(ids) - done) / rate:.0f} s")
    return {"rows": rows, "largest": largest, "zero_gradient": zero_gradient, "replaced": replaced}


def _attack(tower, head: Head, images, labels, seeds, settings: Quick):
    def loss(x):
        return losses.cross_entropy(head(tower(x)).logits, labels)

    with torch.enable_grad():
        x = images.clone().requires_grad_(True)
        gradient = torch.autograd.grad(loss(x).sum(), x)[0]
    zeros = int((gradient.flatten(1) == 0).all(1).sum())
    adv = pgd(loss, images, norm=settings.norm, eps=float(settings.eps), step_size=settings.step_size, steps=settings.steps, seeds=seeds)
    return adv, zeros


def _size(delta: torch.Tensor, norm: str) -> float:
    flat = delta.flatten(1)
    return float(flat.abs().max() if norm == "linf" else flat.norm(dim=1).max())


def _accuracy(flags: list[bool]) -> dict:
    low, high = wilson_interval(sum(flags), len(flags))
    return {"accuracy": sum(flags) / len(flags), "interval95": [low, high], "n": len(flags)}


def show(results: dict) -> None:
    """Print a table of one evaluation's results."""
    print(f"{results['model']['weights']} on {results['data']}, protocol quick, {results['settings']['norm']} eps {results['settings']['eps']}")
    table = Table()
    for column in ("", "accuracy %", "95 % interval", "samples"):
        table.add_column(column, justify="right" if column else "left")
    for name, label in (("clean", "clean"), ("pgd", f"PGD-{results['settings']['steps']}")):
        r = results[name]
        low, high = r["interval95"]
        table.add_row(label, f"{100 * r['accuracy']:.2f}", f"{100 * low:.2f} - {100 * high:.2f}", str(r["n"]))
    Console().print(table)
    health = results["health"]
    print(
        f"chance {100 * results['chance']:.2f} %  logit scale {results['logit_scale']:.4g}  largest perturbation {health['largest_perturbation']:.6f}"
        f"  zero gradients {health['zero_gradient_samples']}  replaced images {health['replaced']}"
    )


def save(results: dict, path: Path) -> None:
    """Write the results as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(json.dumps(results, indent=1))
    scratch.replace(path)
