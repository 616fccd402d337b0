"""What a training needs before its first step: models, teachers, data, engine."""

from __future__ import annotations

import torch

from ..config import Teacher
from ..distributed.ranks import Ranks
from ..embeddings.store import EmbeddingStore
from ..embeddings.teacher import StoredTeacher
from ..models.clip import Clip
from ..models.teachers import FrozenTeacher
from ..zero_shot import ZeroShotHead


def build_teachers(
    settings: dict[str, Teacher],
    clips: dict[str, Clip],
    heads: dict[str, ZeroShotHead],
    stored: dict[str, EmbeddingStore],
    ranks: Ranks,
    dtype: torch.dtype,
) -> dict[str, FrozenTeacher | StoredTeacher]:
    """The ensemble of a configuration, each teacher run in `dtype`; those in `stored` are not run at all."""
    return {
        name: StoredTeacher(name, stored[name], clips[name].tower(), heads[name], dtype)
        if name in stored
        else FrozenTeacher(name, teacher, clips[name].tower(), heads[name], ranks, dtype)
        for name, teacher in settings.items()
    }
