"""The optimiser's settings: parameter groups, learning rate, bucket size."""

from __future__ import annotations

import math

import torch


def parameter_groups(tower: torch.nn.Module, weight_decay: float) -> list[dict]:
    """AdamW groups: decay on matrices and larger, none on gains, biases and the class token."""
    trained = [p for p in tower.parameters() if p.requires_grad]
    matrices, rest = [p for p in trained if p.dim() >= 2], [p for p in trained if p.dim() < 2]
    return [{"params": p, "weight_decay": w} for p, w in ((matrices, weight_decay), (rest, 0.0)) if p]


def bucket_size(elements: int) -> int:
    """Gradients that are reduced together: DeepSpeed's default, whose buffer is 2 GB, or as many as there are."""
    return min(elements, 500_000_000)


def learning_rate(step: int, lr: float, warmup_steps: int, steps: int) -> float:
    """Rate of update `step` (0-based): linear warm-up to `lr`, then half a cosine to 0 at `steps`."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))
