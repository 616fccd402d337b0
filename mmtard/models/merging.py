"""Two models of one architecture and one text tower as one: their image towers' weights interpolated."""

from __future__ import annotations

import copy
import json
import os
import shlex
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import Model
from ..errors import UserError
from ..files import why_not_written, write_text
from ..folders import check_replaceable, replace_folder
from . import loading
from .clip import Clip
from .weights import require_finite

KIND = "model"  # of the folder, as `mmtard export` writes it
NOTE = "merged.json"


def merge(first: Model, second: Model, weight: float, out: Path) -> Path:
    """Write (1 - weight) * first + weight * second as a folder that open_clip and every command here load.

    As WiSE-FT does of a model before and after fine-tuning (Wortsman et al., "Robust fine-tuning of zero-shot models",
    CVPR 2022); the text tower, which training leaves alone, is that of both. Whole or not at all, in place of an
    earlier one. Raises UserError for a weight outside [0,1], models that do not fit each other, and a folder that
    mmtard did not make.
    """
    _check_weight(weight)  # before models are fetched
    for name, spec in (("A", first), ("B", second)):
        if os.path.realpath(out) == os.path.realpath(spec.weights):
            raise UserError(f"'{out}' is {name} itself; choose another OUT")
    check_replaceable(out, KIND)
    a, b = loading.load_clip(first, where="A"), loading.load_clip(second, where="B")
    merged = interpolate(a, b, weight)
    note = {"a": _said(first, a), "b": _said(second, b), "weight": weight}
    try:
        with replace_folder(out, KIND) as scratch:
            merged.save(scratch / "model")
            for path in (scratch / "model").iterdir():
                path.rename(scratch / path.name)
            (scratch / "model").rmdir()
            write_text(scratch / NOTE, json.dumps(note, indent=2) + "\n")
    except OSError as error:
        needed = sum(value.nbytes for value in merged.model.state_dict().values())
        raise UserError(why_not_written(out, error, needed, "choose another OUT")) from None
    return out


def merged_from(folder: Path) -> list[Path]:
    """The folders of the two models that a folder was merged from, the second first, as far as they are still there.

    [] for any other folder, and for a note that is damaged.
    """
    try:
        folders = [_note(folder)[part].get("folder") for part in ("b", "a")]
    except (KeyError, AttributeError, TypeError):
        return []
    return [Path(one) for one in folders if isinstance(one, str) and one and os.path.isdir(one)]


def merge_command(folder: Path) -> str | None:
    """The `mmtard merge` that wrote a folder; None for any other folder, and for a note that is damaged."""
    try:
        note = _note(folder)
        a, b, weight, ema = note["a"]["weights"], note["b"]["weights"], float(note["weight"]), note["b"]["ema"]
        return shlex.join(["mmtard", "merge", a, b, "--weight", str(weight), "OUT", *["--ema"] * bool(ema)])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def _note(folder: Path) -> Any:
    """What `merge` noted in a folder, as JSON has it; None where it is not there or cannot be read."""
    try:
        return json.loads((folder / NOTE).read_text()) if (folder / NOTE).is_file() else None
    except (OSError, ValueError, RecursionError):
        return None


def interpolate(a: Clip, b: Clip, weight: float) -> Clip:
    """A new Clip whose image tower is (1 - weight) * a + weight * b; `a` and `b` stay as they are.

    Integers (batch norm's counts) are those of the nearer model. Raises UserError where the two do not fit, or are so
    far apart that a number between them is not finite.
    """
    _check_weight(weight)
    _check_fit(a, b)
    other = b.model.visual.state_dict()

    def between(name: str, value: Tensor) -> Tensor:
        if value.is_floating_point():
            return torch.lerp(value, other[name], weight)
        return (value if weight < 0.5 else other[name]).clone()

    with torch.no_grad():
        visual = {name: between(name, value) for name, value in a.model.visual.state_dict().items()}
    require_finite(visual, "the image tower between A and B")
    merged = Clip(copy.deepcopy(a.model), a.name, a.config)
    merged.model.visual.load_state_dict(visual)
    return merged


def _check_weight(weight: float) -> None:
    if not 0 <= weight <= 1:
        raise UserError(f"--weight: {weight} is not between 0 (A alone) and 1 (B alone)")


def _said(spec: Model, clip: Clip) -> dict:
    """What the note says of one of the two; its folder, so that an evaluation finds the prompts of a run's training."""
    folder = Path(spec.weights)
    return {
        "weights": spec.weights,
        "folder": str(folder.absolute()) if folder.is_dir() else None,
        "ema": spec.ema,
        "sha256": clip.sha256(image=True),
    }


def _check_fit(a: Clip, b: Clip) -> None:
    for section in ("model_cfg", "preprocess_cfg"):
        ours, theirs = a.config[section], b.config[section]
        apart = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
        if apart:
            raise UserError(
                f"A and B: their {section} differs in {', '.join(apart)} ({ours.get(apart[0])} and "
                f"{theirs.get(apart[0])}); only two models of one architecture can be merged"
            )
    if a.sha256(image=False) != b.sha256(image=False):
        raise UserError(
            "A and B: their text towers differ, so their embeddings have no space in common; "
            "merge a model with one that was trained from the same start"
        )
