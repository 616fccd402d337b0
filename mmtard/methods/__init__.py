"""Objectives by name: one small file each, found here; the training step computes exactly the passes one declares.

A method file defines
    passes(settings) -> set[Pass]                  the (model, view) pairs it needs; model is "student" or a teacher's name
    loss(settings, predictions, labels)            predictions: dict[Pass, Prediction], labels int64 [B]
        -> (per-sample loss [B], {name: per-sample term [B]})
Its settings are a class in `mmtard.config` with the same name. Views: "clean" (x) and "adv" (x').
"""

from importlib import import_module
from typing import NamedTuple, Protocol

from torch import Tensor

from ..config import METHODS
from ..errors import unknown
from ..losses import class_cosines


class Pass(NamedTuple):
    model: str
    view: str


class Prediction(NamedTuple):
    """One model's output on one view of a batch; logits = logit_scale * cosines."""

    embeddings: Tensor  # [B,D], not normalised
    cosines: Tensor  # [B,C]
    logits: Tensor  # [B,C]


class Head(NamedTuple):
    """A frozen text side: `class_embeddings` [C,D] normalised float32, and the logit scale (100 for OpenAI's CLIP)."""

    class_embeddings: Tensor
    logit_scale: float

    def __call__(self, embeddings: Tensor) -> Prediction:
        """Image embeddings [B,D] of any float type -> Prediction in float32 (float64 stays)."""
        z = embeddings.to(self.class_embeddings.dtype)
        cosines = class_cosines(z, self.class_embeddings)
        return Prediction(z, cosines, self.logit_scale * cosines)


class Method(Protocol):
    def passes(self, settings) -> set[Pass]: ...

    def loss(self, settings, predictions: dict[Pass, Prediction], labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]: ...


def find(name: str) -> Method:
    """The module of the objective called `name`; UserError lists the known ones."""
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return import_module(f".{name}", __name__)
