"""How the batch of the current forward is laid out: groups of clean and adversarial images, and one seed per image."""

from __future__ import annotations

import torch
from torch import Tensor

from ..seeding import purpose_salt


class BatchLayout:
    """The batch of the current forward: `groups` views of the same samples, one after the other, and a seed per image.

    All layers of a tower share one layout. They read it again when activation checkpointing repeats their forward.
    """

    def __init__(self):
        self.groups = 1
        self.seeds: Tensor | None = None  # int64 [groups * samples]

    def describe(self, images: int, seeds: Tensor) -> None:
        """Set what the next forward takes: so many images, views of the samples that have these seeds int64 [B]."""
        self.groups = images // len(seeds)
        self.seeds = torch.cat([seeds ^ purpose_salt(f"view {view}") for view in range(self.groups)])
