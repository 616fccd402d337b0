"""The model card: what the weights are, how they were trained, and how robust they were measured to be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from .. import config as settings
from ..config import Model
from ..errors import UserError
from ..models.clip import Clip
from ..models.merging import merge_command
from ..models.weights import tensors_sha256
from ..report.finding import is_model_folder
from ..report.records import Accuracy, Evaluation
from ..report.run_files import ReportSource, read_run
from ..report.shown import Safe, block, code, markdown, typed
from ..report.sources import evaluations_of
from ..report.tables import said_prompts
from ..resources import VERSION
from ..runs import checkpoints
from ..runs.layout import CONFIG
from .metadata import front_matter

TEMPLATE = "card.md.j2"


@dataclass(frozen=True)
class Origin:
    """The run that weights come from: its files, its configuration, the state of the checkpoint that was taken."""

    source: ReportSource
    config: settings.Config | None
    state: dict

    @property
    def facts(self) -> dict:
        """Versions, the commit and the command of its newest start, as far as they are stored."""
        stored = self.source.environment or {}
        versions, git = stored.get("versions"), stored.get("git")
        git = git if isinstance(git, dict) else {}
        return {
            "versions": {k: v for k, v in versions.items() if v} if isinstance(versions, dict) else {},
            "commit": git.get("commit"),
            "changed": bool(git.get("changed")),
            "command": typed(str(stored.get("command") or "")),
        }


def model_card(clip: Clip, source: Model, hf: bool = False, adapter: bool = False) -> str:
    """Return README.md of an exported folder, in Markdown.

    Numbers come from the evaluations of exactly these weights, wherever they lie beside the run; where there are none
    it says so. hf, adapter: what the folder holds beside or instead of the open_clip model. Every name, path and
    command is escaped, so that none of them is taken for Markdown or HTML.
    """
    origin = _origin(source)
    sha256 = tensors_sha256(clip.model.visual.state_dict())
    folder = origin.source.path if origin else Path(source.weights)
    evaluations = evaluations_of(folder) if folder.is_dir() else []
    own = [e for e in evaluations if e.model.sha256 == sha256]
    name = origin.source.name if origin else Path(source.weights).resolve().name
    config = origin.config if origin else None
    return (
        _environment()
        .get_template(TEMPLATE)
        .render(
            front_matter=front_matter(name, config.student if config else source, own),
            name=name,
            weights=source,
            origin=origin,
            merged=None if origin else merge_command(folder),
            image_size="x".join(dict.fromkeys(map(str, _sides(clip)))),
            activation="QuickGELU" if clip.config["model_cfg"].get("quick_gelu") else "GELU",
            preprocess=clip.config["preprocess_cfg"],
            logit_scale=clip.logit_scale,
            sha256=sha256,
            evaluations=own,
            of_other_weights=len(evaluations) - len(own) if origin else 0,
            checks=_checks(own),
            hf=hf,
            adapter=adapter,
            version=VERSION,
        )
    )


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("mmtard.export", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=markdown,  # all that is not `Safe`
    )
    environment.filters |= {
        "acc": _accuracy,
        "percent": lambda fraction: f"{100 * fraction:.2f}",
        "pixels": settings.show_pixels,
        "code": code,
        "block": block,
        "safe": Safe,
        "typed": typed,
        "prompts": lambda e: "; ".join(dict.fromkeys(said_prompts(d.templates) for d in e.zeroshot)),
    }
    return environment


def _sides(clip: Clip) -> tuple[int, ...]:
    size = clip.tower().image_size
    return tuple(size) if isinstance(size, tuple | list) else (size,)


def _origin(source: Model) -> Origin | None:
    folder = Path(source.weights)
    if not folder.is_dir() or is_model_folder(folder):
        return None
    run, state = checkpoints.read_resolved(folder, lambda run, checkpoint: (run, checkpoints.read_state(checkpoint)))
    try:
        config = settings.load(run / CONFIG)
    except UserError:  # of another version, or gone: the card has its text at most
        config = None
    return Origin(read_run(run), config, state)


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
