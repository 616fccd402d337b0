"""What one forward of a student holds, for the layers that treat samples or views apart."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


class Views:
    """The batch of the forward under way: `count` views of the same samples, one after the other, and a seed for each image.

    A tower's layers share one; they read it again when activation checkpointing repeats their forward.
    """

    def __init__(self):
        self.count = 1
        self.seeds: Tensor | None = None  # int64 [count * samples]

    def show(self, images: int, seeds: Tensor) -> None:
        """The next forward takes this many images: views of the samples whose seeds int64 [B] these are."""
        self.count = images // len(seeds)
        self.seeds = torch.cat([seeds ^ salt(f"view {view}") for view in range(self.count)])


def salt(purpose: str) -> int:
    """63 bits that set a purpose's random numbers apart from all others of the same seeds."""
    return int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest()) >> 1
