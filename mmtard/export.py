"""A run as files that others load: an open_clip folder, and the image tower alone."""

from __future__ import annotations

from pathlib import Path

import torch

from . import towers
from .config import Model
from .errors import UserError

TOWER_FILE = "image_tower.pt"


def export(source: Path, out: Path) -> list[Path]:
    """Write the newest checkpoint of a run (or the given one) to `out`; the files written.

    `open_clip.create_model_and_transforms("local-dir:OUT")` loads the folder; `image_tower.pt` is the plain state_dict of the image
    tower that `model.visual.load_state_dict` takes. Raises UserError when `out` holds something else.
    """
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / towers.CONFIG_FILE).is_file())):
        raise UserError(f"'{out}' exists and is no exported folder; choose another OUT")
    clip = towers.load(Model(weights=str(source)), where="export")
    clip.save(out)
    torch.save(clip.model.visual.state_dict(), out / TOWER_FILE)
    return sorted(out.iterdir())
