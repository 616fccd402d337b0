"""The exported folder: what open_clip loads, the image tower alone, a model card, and what transformers loads."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import torch

from ..config import Model
from ..errors import UserError
from ..files import why_not_written
from ..folders import MANIFEST, check_replaceable, replace_folder
from ..models import loading
from ..models.clip import Clip
from .adapter import Adapter
from .card import model_card
from .hf import FOLDER as HF_FOLDER, save_transformers

TOWER_FILE, CARD = "image_tower.pt", "README.md"
KIND = "model"
LITTLE_ROOM = 2**20  # bytes free on a disk that torch could not write to because it was full


def export(source: Model, out: Path, hf: bool = False, merge_lora: bool = False) -> list[Path]:
    """Write a model to the folder `out`, whole or not at all; return the files written.

    `open_clip.create_model_and_transforms("local-dir:OUT")` loads the folder. `image_tower.pt` is the plain state_dict
    of the image tower that `model.visual.load_state_dict` takes, as RobustVLM publishes its towers. `README.md` is the
    model card. hf: also `transformers/`, which `transformers.CLIPModel.from_pretrained` loads. A run that trained
    adapters is written as a peft folder instead, unless `merge_lora` folds them into the weights.

    Raises UserError when `out` holds anything but an earlier export as it was written, when the model cannot be loaded,
    when the disk is full, and with `hf` when transformers has no such architecture.
    """
    check_replaceable(out, KIND)
    if os.path.realpath(out) == os.path.realpath(source.weights):
        raise UserError(f"'{out}' is the model itself; choose another OUT")
    adapter = Adapter(source)
    if merge_lora and not adapter.found:
        raise UserError(
            f"--merge-lora: '{source.weights}' holds no adapter, its student was trained whole; leave the flag out"
        )
    if hf and adapter.found and not merge_lora:
        raise UserError(
            "--hf: transformers loads whole models alone; add --merge-lora to fold the adapter into the weights"
        )
    as_adapter = adapter.found and not merge_lora
    clip = loading.load_clip(source, where="export")  # with an adapter folded in, which the card describes
    try:
        with replace_folder(out, KIND) as scratch:
            if as_adapter:
                adapter.save(scratch)
            else:
                _save(clip, scratch)
            if hf:
                save_transformers(clip, scratch / HF_FOLDER)
            (scratch / CARD).write_text(model_card(clip, source, hf, as_adapter), encoding="utf-8")
    except OSError as error:
        needed = sum(value.nbytes for value in clip.model.state_dict().values())
        raise UserError(why_not_written(out, error, needed, "choose another OUT")) from None
    return sorted(path for path in out.rglob("*") if path.is_file() and path != out / MANIFEST)


def _save(clip: Clip, folder: Path) -> None:
    """Write what open_clip loads, and the tower file. Raises OSError when there is no room."""
    model = folder / "model"  # in the folder: what an interruption leaves of it goes with the folder
    clip.save(model)
    for path in model.iterdir():
        path.rename(folder / path.name)
    model.rmdir()
    try:
        torch.save(clip.model.visual.state_dict(), folder / TOWER_FILE)
    except RuntimeError as error:  # torch's own writer does not say why
        full = shutil.disk_usage(folder).free < LITTLE_ROOM
        number, text = (errno.ENOSPC, "No space left on device") if full else (errno.EIO, str(error))
        raise OSError(number, text) from None
