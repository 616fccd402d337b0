"""The frozen text side of each model of a run: class embeddings computed once, stored, and read again at every start."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open

from .checkpoint import save_tensors
from .errors import UserError
from .methods import Head
from .parallel import Ranks
from .towers import Clip

FILE = "class_embeddings.safetensors"


def build(run: Path, clips: dict[str, Clip], classnames: list[str], templates: list[str], ranks: Ranks) -> dict[str, Head]:
    """A Head for each model on the ranks' device; the first rank asks the text towers, the others receive its bits.

    Collective. Raises UserError when the run stored embeddings of other class names or templates.
    """
    stored = ranks.from_first(lambda: _stored(run / FILE, clips, classnames, templates, ranks))
    return {name: Head(stored[name].to(ranks.device), clip.logit_scale) for name, clip in clips.items()}


def without_classes(clips: dict[str, Clip], ranks: Ranks) -> dict[str, Head]:
    """A Head of no class for each model, whose predictions are embeddings alone."""
    return {name: Head(torch.empty(0, clip.config["model_cfg"]["embed_dim"], device=ranks.device), clip.logit_scale) for name, clip in clips.items()}


def _stored(path: Path, clips, classnames, templates, ranks) -> dict[str, torch.Tensor]:
    asked = hashlib.sha256(json.dumps([classnames, templates]).encode()).hexdigest()
    text_towers = json.dumps({name: clip.sha256(image=False) for name, clip in sorted(clips.items())})
    if path.is_file():
        with safe_open(path, "pt") as file:
            if file.metadata().get("prompts") != asked:
                raise UserError(f"data.classnames: not the names and templates that '{path}' was made with; restore them or choose another run_dir")
            if file.metadata().get("text_towers") == text_towers:
                return {name: file.get_tensor(name) for name in clips}
    embeddings = {name: clip.class_embeddings(classnames, templates, ranks.device) for name, clip in clips.items()}
    save_tensors(embeddings, path, {"prompts": asked, "text_towers": text_towers})
    return embeddings
