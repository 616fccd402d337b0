"""The exported folder: what open_clip loads, the image tower alone, a model card, and what transformers loads."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from ..config import Model
from ..errors import UserError
from ..models import loading
from ..models.clip import CONFIG_FILE
from ..models.lora import ADAPTER_CONFIG
from .adapter import Adapter
from .card import model_card
from .hf import FOLDER as HF_FOLDER, save_transformers

TOWER_FILE, CARD = "image_tower.pt", "README.md"


def export(source: Model, out: Path, hf: bool = False, merge_lora: bool = False) -> list[Path]:
    """Write a model to the folder `out`, whole or not at all; the files written.

    `open_clip.create_model_and_transforms("local-dir:OUT")` loads the folder; `image_tower.pt` is the plain state_dict of the image
    tower that `model.visual.load_state_dict` takes, as RobustVLM publishes its towers; `README.md` is the model card. hf: also
    `transformers/`, which `transformers.CLIPModel.from_pretrained` loads. A run that trained adapters is written as a peft
    folder instead, unless `merge_lora` folds them into the weights. Raises UserError when `out` holds something else, when
    the model cannot be loaded, and with `hf` when transformers has no such architecture.
    """
    if out.exists() and (
        not out.is_dir()
        or (any(out.iterdir()) and not any((out / name).is_file() for name in (CONFIG_FILE, ADAPTER_CONFIG)))
    ):
        raise UserError(f"'{out}' exists and is no exported folder; choose another OUT")
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
    scratch = out.with_name(f".{out.name}.exporting")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        if as_adapter:
            adapter.save(scratch)
        else:
            clip.save(scratch)
            torch.save(clip.model.visual.state_dict(), scratch / TOWER_FILE)
        if hf:
            save_transformers(clip, scratch / HF_FOLDER)
        (scratch / CARD).write_text(model_card(clip, source, hf, as_adapter), encoding="utf-8")
        shutil.rmtree(out, ignore_errors=True)
        scratch.rename(out)
    except OSError as error:
        raise UserError(f"cannot write '{out}': {error.strerror or error}; free space or choose another OUT") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return sorted(path for path in out.rglob("*") if path.is_file())
