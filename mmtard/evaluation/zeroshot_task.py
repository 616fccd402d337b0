"""What a zero-shot classification is asked to do, and what its clean pass found."""

from __future__ import annotations

from dataclasses import dataclass

from ..attacks.state import Classifier
from .chunks import ChunkedWork
from .partial_results import PartialResults
from .protocols import Protocol


@dataclass(frozen=True)
class ZeroShotTask:
    """One dataset to be classified. transfer_from: the model that `transfer` attacks in place of this one."""

    name: str
    work: ChunkedWork
    progress: PartialResults
    logits: Classifier
    transfer_from: Classifier | None
    class_names: list[str]
    protocol: Protocol


@dataclass(frozen=True)
class CleanPass:
    """What the model says of every readable sample, and which of them are attacked."""

    labelled: int  # samples with a label, readable or not
    left_out: list[tuple[str, str]]  # (name, reason) of those that could not be read
    prediction: dict[int, int]  # sample id -> class, or losses.NO_CLASS
    label: dict[int, int]
    ids: list[int]  # the stratified sample, in the order of the ids

    def right(self, sample: int) -> bool:
        """Whether a sample is classified as it is labelled."""
        return self.prediction[sample] == self.label[sample]
