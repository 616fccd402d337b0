"""Objectives by name: one small file each, found here; the training step computes exactly the passes one declares.

A method file defines

    passes(settings) -> set[Pass]
        The (model, image) pairs it needs; the model is "student" or a teacher's name.
    loss(settings, predictions, labels, state) -> (loss [B], {name: term [B]})
        predictions: dict[Pass, Prediction]; labels int64 [B]; state: the method's own.

and, when it carries numbers from step to step,

    first_state(settings) -> dict[str, float]
    next_state(settings, state, means) -> dict[str, float]
        means: the terms' means over the step's global batch, and quantiles of weights and entropies.

Its settings are a class in `mmtard/config/methods.py` with the same name. The image is "clean" (x) or "adv" (x'). The
teacher "start" (T0) is the student before training. Terms that start with `w_` are weights.
"""

from importlib import import_module
from typing import NamedTuple, Protocol

from torch import Tensor

from ...config import METHODS
from ...errors import unknown_name
from ...zero_shot import Prediction


class Pass(NamedTuple):
    """A forward that an objective needs: `model` ("student" or a teacher's name) on `image` ("clean" or "adv")."""

    model: str
    image: str


class Method(Protocol):
    """What a file of an objective defines; the head of this page has the meanings."""

    def passes(self, settings) -> set[Pass]:
        """The passes that the loss reads."""

    def loss(
        self, settings, predictions: dict[Pass, Prediction], labels: Tensor, state: dict[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss [B], {name: term [B]}) of a batch."""


def find_method(name: str) -> Method:
    """The module of the objective called `name`; UserError lists the known ones."""
    if name not in METHODS:
        raise unknown_name("method", name, METHODS)
    return import_module(f".{name}", __name__)


def first_state(method: Method, settings) -> dict[str, float]:
    """The state of a method before the first step; empty for one that carries none."""
    return method.first_state(settings) if hasattr(method, "first_state") else {}


def next_state(method: Method, settings, state: dict[str, float], means: dict[str, float]) -> dict[str, float]:
    """The state after a step whose terms had these means over the global batch."""
    return method.next_state(settings, state, means) if hasattr(method, "next_state") else state
