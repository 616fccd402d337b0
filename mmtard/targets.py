"""What a sample's true class is: its label among the class names, its own caption among those of the step's global batch, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from . import data, heads
from .config import Config
from .data import Batch
from .methods import Head, Prediction
from .parallel import Ranks
from .towers import Clip


def build(config: Config, run: Path, clips: dict[str, Clip], dataset: data.Dataset, ranks: Ranks) -> tuple[dict[str, Head], Callable[[Batch], Batch]]:
    """(a Head for each model, what every batch has to pass before it is trained on), by `data.targets`. Both are collective."""
    if config.data.targets == "captions":
        captions = Captions(clips, ranks)
        return captions.heads, captions
    if config.data.targets == "none":
        return heads.without_classes(clips, ranks), lambda batch: batch
    return heads.build(run, clips, data.classnames(config.data, dataset), data.templates(config.data), ranks), lambda batch: batch


class Captions:
    """Makes the captions of a step's global batch its classes, each embedded by every model's own frozen text tower.

    Which classes there are, and in which order, depends on the global batch alone: equal captions are one class, the classes are
    sorted. A rank embeds the captions of its own samples and receives the others', so that the text towers' work is shared. They
    stay on the ranks' device in float32.
    """

    def __init__(self, clips: dict[str, Clip], ranks: Ranks):
        self.ranks = ranks
        self.towers = {name: clip.text_tower().to(ranks.device) for name, clip in clips.items()}
        self.heads = {name: CaptionHead(clip.logit_scale) for name, clip in clips.items()}

    def __call__(self, batch: Batch) -> Batch:
        """Give the heads the classes of this step; the rank's batch with each sample's own caption as its label. Collective."""
        own = sorted(set(batch.captions))
        shared = self.ranks.gather((own, {name: tower(own).cpu() for name, tower in self.towers.items()}))
        place = {caption: (embedded, row) for captions, embedded in reversed(shared) for row, caption in enumerate(captions)}
        classes = sorted(place)
        for name, head in self.heads.items():
            head.class_embeddings = torch.stack([embedded[name][row] for embedded, row in map(place.get, classes)]).to(self.ranks.device)
        index = {caption: i for i, caption in enumerate(classes)}
        return replace(batch, labels=torch.tensor([index[caption] for caption in batch.captions]))


class CaptionHead:
    """A Head whose `class_embeddings` [C,D] are those of the step under way."""

    def __init__(self, logit_scale: float):
        self.class_embeddings, self.logit_scale = torch.empty(0, 0), logit_scale

    def __call__(self, *outputs: Tensor) -> Prediction:
        return Head(self.class_embeddings, self.logit_scale)(*outputs)
