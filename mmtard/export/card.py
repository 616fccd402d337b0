"""The model card: what the weights are, how they were trained, and how robust they were measured to be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from .. import __version__, config as settings
from ..config import Model
from ..errors import UserError
from ..models.clip import Clip
from ..models.weights import tensors_sha256
from ..report import sources
from ..report.records import Accuracy, Evaluation
from ..runs import checkpoints

TEMPLATE = "card.md.j2"


@dataclass(frozen=True)
class Origin:
    """The run that weights come from: its files, its configuration, and the state of the checkpoint they were taken from."""

    source: sources.ReportSource
    config: settings.Config | None
    state: dict


def model_card(clip: Clip, source: Model, hf: bool = False, adapter: bool = False) -> str:
    """README.md of an exported folder, in Markdown.

    Numbers come from the evaluations of exactly these weights; where there are none it says so. hf, adapter: what the folder
    holds beside or instead of the open_clip model.
    """
    origin = _origin(source)
    sha256 = tensors_sha256(clip.model.visual.state_dict())
    evaluations = origin.source.evaluations if origin else []
    own = [e for e in evaluations if e.model.sha256 == sha256]
    environment = Environment(
        loader=PackageLoader("mmtard.export", "."), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "acc": _accuracy,
        "percent": lambda fraction: f"{100 * fraction:.2f}",
        "pixels": settings.show_pixels,
    }
    return environment.get_template(TEMPLATE).render(
        name=origin.source.name if origin else Path(source.weights).name,
        weights=source,
        origin=origin,
        image_size=clip.tower().image_size,
        activation="QuickGELU" if clip.config["model_cfg"].get("quick_gelu") else "GELU",
        preprocess=clip.config["preprocess_cfg"],
        logit_scale=clip.logit_scale,
        sha256=sha256,
        evaluations=own,
        of_other_weights=len(evaluations) - len(own),
        checks=_checks(own),
        hf=hf,
        adapter=adapter,
        version=__version__,
    )


def _origin(source: Model) -> Origin | None:
    folder = Path(source.weights)
    if not folder.is_dir() or (folder / "open_clip_config.json").is_file():
        return None
    run, state = checkpoints.read_resolved(folder, lambda run, checkpoint: (run, checkpoints.read_state(checkpoint)))
    found = sources.read_run(run)
    try:
        config = settings.load(run / sources.CONFIG)
    except UserError:  # of another version, or gone: the card has its text at most
        config = None
    return Origin(found, config, state)


def _checks(evaluations: list[Evaluation]) -> dict[str, list[str]]:
    """Health lines by status."""
    lines: dict[str, list[str]] = {"PASS": [], "WARN": [], "FAIL": []}
    for evaluation in evaluations:
        for dataset in evaluation.datasets:
            for check in dataset.health:
                lines[check.status].append(f"{dataset.name}, {check.check}: {check.detail}")
    return lines


def _accuracy(value: Accuracy) -> str:
    low, high = value.interval95
    return f"{100 * value.accuracy:.2f} ({100 * low:.1f}–{100 * high:.1f}), n {value.n}"
