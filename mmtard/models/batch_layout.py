"""What one forward of a student holds, for the layers that treat samples or views apart."""

from __future__ import annotations

import torch
from torch import Tensor

from ..seeding import purpose_salt


class BatchLayout:
    """The batch of the forward under way: `count` views of the same samples, one after the other, and a seed for each image.

    A tower's layers share one; they read it again when activation checkpointing repeats their forward.
    """

    def __init__(self):
        self.groups = 1
        self.seeds: Tensor | None = None  # int64 [count * samples]

    def describe(self, images: int, seeds: Tensor) -> None:
        """The next forward takes this many images: views of the samples whose seeds int64 [B] these are."""
        self.groups = images // len(seeds)
        self.seeds = torch.cat([seeds ^ purpose_salt(f"view {view}") for view in range(self.groups)])
