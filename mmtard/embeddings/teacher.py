"""A teacher whose embeddings of clean images are read from disk."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.image_tower import ImageTower
from ..zero_shot import Prediction, ZeroShotHead
from .store import EmbeddingStore


class StoredTeacher:
    """A teacher whose image tower stays on disk: its stored embeddings come with the batches, only its head is here."""

    bytes_here = 0

    def __init__(self, name: str, stored: EmbeddingStore, tower: ImageTower, head: ZeroShotHead, dtype: torch.dtype):
        self.name, self.head = name, head
        at_once = stored.manifest.get("images_at_once", "?")
        self.placement = f"stored in {stored.folder} (made {at_once} images at a time)"
        self.bytes_whole = sum(p.numel() for p in tower.parameters()) * dtype.itemsize

    def __call__(self, images: Tensor) -> Prediction:
        raise ValueError(f"teacher '{self.name}' is stored and cannot be asked about other images")
