"""The optimiser's settings: parameter groups, learning rate, bucket size."""

from __future__ import annotations

import math

import torch

from ..config import Train

BUCKET = 25_000_000  # 100 MB: a ViT-B/32 has four


def parameter_groups(tower: torch.nn.Module, weight_decay: float) -> list[dict]:
    """AdamW groups: decay on matrices and larger, none on gains, biases and the class token."""
    trained = [p for p in tower.parameters() if p.requires_grad]
    matrices, rest = [p for p in trained if p.dim() >= 2], [p for p in trained if p.dim() < 2]
    return [{"params": p, "weight_decay": w} for p, w in ((matrices, weight_decay), (rest, 0.0)) if p]


def bucket_size(elements: int) -> int:
    """Gradients that are reduced together: few enough that the first ones travel while the backward goes on."""
    return min(elements, BUCKET)


def learning_rate(step: int, train: Train) -> float:
    """Rate of update `step` (0-based) of the settings' schedule.

    cosine: linear warm-up to `lr`, then half a cosine to 0 at `steps`. onecycle: half a cosine from lr / 25 up to `lr`,
    which update `warmup_steps` has (after three tenths of the run where that is 0), then half a cosine down to lr /
    250,000 in the last update; Smith & Topin, "Super-Convergence", 2018, as torch's OneCycleLR has it, AdamW's betas
    left as they are.
    """
    if train.schedule == "onecycle":
        return train.lr * _one_cycle(step, train.warmup_steps or max(0, 0.3 * train.steps - 1), train.steps - 1)
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    part = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    return train.lr * 0.5 * (1 + math.cos(math.pi * part))


def _one_cycle(step: int, top: float, last: int) -> float:
    """The share of the largest rate: from 1/25 at 0 to 1 at `top` to 1/250,000 at `last`, in halves of a cosine."""
    if step <= top:
        start, end, part = 1 / 25, 1.0, step / top if top > 0 else 1.0
    else:
        start, end, part = 1.0, 1 / 250_000, (step - top) / (last - top)
    return end + (start - end) / 2 * (1 + math.cos(math.pi * part))
