"""What a step is recorded as."""

from __future__ import annotations

import torch


def batch_digest(seeds: torch.Tensor) -> float:
    """A number for which samples of which epoch these are, whatever their order: seeds int64 [b]; adds up over ranks, exactly."""
    return float((seeds & 0xFFFFFFFF).sum().item())
