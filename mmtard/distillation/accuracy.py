"""The accuracy of the batch that is trained on, from the student's predictions that the loss has asked for anyway."""

from __future__ import annotations

from torch import Tensor

from ..losses import top1
from ..zero_shot import Prediction
from .methods import Pass

LABELLED = "labelled"  # the term that counts the samples whose class is known
ACCURACY = "acc_"  # terms that start so are hits among these


def batch_hits(predictions: dict[Pass, Prediction], labels: Tensor) -> dict[str, Tensor]:
    """Whether the student, as it is trained, gets each sample right: `acc_clean` and `acc_adv`, those of them that were
    computed, and `labelled`, each float [B].

    labels int64 [B], -1 where none is known, which is no hit. Empty where there are no classes.
    """
    known = labels >= 0
    hits = {
        f"{ACCURACY}{image}": top1(prediction.logits, labels) & known
        for (model, image), prediction in predictions.items()
        if model == "student" and prediction.logits.shape[-1]
    }
    return {name: hit.float() for name, hit in hits.items()} | ({LABELLED: known.float()} if hits else {})


def accuracies(means: dict[str, float]) -> dict[str, float]:
    """The means of a step with each accuracy over the labelled samples alone; NaN where the batch has none."""
    labelled = means.get(LABELLED, 1.0)

    def over_labelled(name: str, mean: float) -> float:
        if not name.startswith(ACCURACY):
            return mean
        return mean / labelled if labelled else float("nan")

    return {name: over_labelled(name, mean) for name, mean in means.items() if name != LABELLED}
