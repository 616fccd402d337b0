"""The card's head, which the Hub reads: library, task, base model, and the measured accuracies as a `model-index`."""

from __future__ import annotations

import re

import open_clip
import yaml

from ..config import Model
from ..report.records import Evaluation, Zeroshot
from ..report.shown import Safe, visible
from ..report.tables import said_prompts

TASK = "zero-shot-image-classification"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def front_matter(name: str, start: Model, evaluations: list[Evaluation]) -> Safe:
    """Return the YAML between two `---` lines.

    start: what the image tower was trained from. evaluations: of exactly these weights.
    """
    head: dict = {"library_name": "open_clip", "pipeline_tag": TASK, "license": "other"}
    base = base_model(start)
    if base:
        head |= {"base_model": base, "base_model_relation": "finetune"}
    head["tags"] = ["clip", "adversarial-robustness", "mmtard"]
    measured = [_result(e, dataset) for e in evaluations for dataset in e.zeroshot]
    if measured:
        head["model-index"] = [{"name": visible(name), "results": measured}]
    text = yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=120)
    return Safe(f"---\n{text}---")


def base_model(start: Model) -> str | None:
    """Return the repository of the Hub that the weights come from; None where they come from none that is known."""
    weights = start.weights
    if weights.startswith("hf-hub:"):
        name = weights.removeprefix("hf-hub:").partition("@")[0]
    else:
        known = open_clip.get_pretrained_cfg((start.arch or "").replace("/", "-"), weights) if start.arch else {}
        name = "/".join(str(known.get("hf_hub") or "").strip("/").split("/")[:2])
    return name if _REPOSITORY.fullmatch(name) else None


def _result(evaluation: Evaluation, dataset: Zeroshot) -> dict:
    """One dataset of the model-index: clean accuracy of all samples, and robust accuracy at each radius, in %."""
    how = evaluation.settings
    attack = f"{', '.join(how.attacks)}, {how.iters} iterations"
    prompts = f"prompts {said_prompts(dataset.templates)}"
    metrics = [_metric(f"clean accuracy, n {dataset.clean_all.n}, {prompts}", dataset.clean_all.accuracy)]
    for eps, at in dataset.eps.items():
        metrics.append(_metric(f"robust accuracy, {how.norm} {eps}, {attack}, n {at.robust.n}", at.robust.accuracy))
    kind = re.sub(r"[^a-z0-9]+", "-", dataset.name.lower()).strip("-") or "other"
    return {"task": {"type": TASK}, "dataset": {"name": visible(dataset.name), "type": kind}, "metrics": metrics}


def _metric(name: str, share: float) -> dict:
    return {"type": "accuracy", "name": visible(name), "value": round(100 * share, 2)}
