"""A CLIP from open_clip's folders and repositories: an open_clip_config.json and the weights beside it."""

from __future__ import annotations

from pathlib import Path

import open_clip
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict
from torch import Tensor, nn

from ..errors import UserError
from .clip import CONFIG_FILE, WEIGHTS_FILE, Clip
from .model_config import build, check_model_config, check_preprocess, read_json
from .unfilled import unfilled
from .weights import load_strictly, read_state_dict

# The names of weights in a model folder, the preferred first, as open_clip looks for them.
FOLDER_WEIGHTS = (
    WEIGHTS_FILE,
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)


def exported_folder(folder: Path, where: str) -> Clip:
    """The model of a folder that holds an open_clip_config.json and weights under one of their usual names.

    Raises UserError, naming the folder, for one that holds no weights.
    """
    found = [folder / name for name in FOLDER_WEIGHTS if (folder / name).is_file()]
    if not found:
        raise UserError(
            f"{where}.weights: cannot load 'local-dir:{folder}': it holds no weights (such as {WEIGHTS_FILE}); copy"
            " them there"
        )
    return read_folder(folder / CONFIG_FILE, found[0], f"local-dir:{folder}", where)


def read_folder(config: Path, weights: Path, name: str, where: str) -> Clip:
    """The model of an open_clip_config.json and a file of weights; name: what open_clip calls the two.

    open_clip's own reader would pass on every key of the config, and stretch positional embeddings of another size to
    fit, without a word.
    """
    cfg, preprocess = folder_config(config, where)
    with unfilled():
        clip = as_clip(build(cfg, preprocess), name, cfg)
    state = in_names_of(clip.model, read_state_dict(weights, where))
    load_strictly(
        clip.model, state, f"{where}.weights: cannot load '{name}': {weights.name}", "check that the folder is whole"
    )
    return clip


def folder_config(path: Path, where: str) -> tuple[dict, dict]:
    """(model_cfg, preprocess_cfg) of an open_clip_config.json, every key of them known."""
    where = f"{where}.weights"
    content = read_json(path, where)
    cfg = check_model_config(content.get("model_cfg"), where, str(path))
    return cfg, check_preprocess(content.get("preprocess_cfg") or {}, where, str(path))


def in_names_of(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A whole model's weights in the names and shapes of `model`, by open_clip's own conversions of older files."""
    state = dict(convert_state_dict(model, state))
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    for name in ("logit_scale", "logit_bias"):
        own = getattr(model, name, None)
        if own is not None and name in state and state[name].numel() == own.numel():
            state[name] = state[name].reshape(own.shape)
    positions = "text.transformer.embeddings.position_ids"
    if positions not in model.state_dict():
        state.pop(positions, None)  # newer transformers keep no such buffer
    return state


def as_clip(model: nn.Module, name: str, cfg: dict) -> Clip:
    """An open_clip model and the `model_cfg` it was made of, with the preprocessing that it carries."""
    preprocess = dict(open_clip.model.get_model_preprocess_cfg(model))
    preprocess = {k: list(v) if isinstance(v, tuple) else v for k, v in preprocess.items()}
    return Clip(model, name, {"model_cfg": cfg, "preprocess_cfg": preprocess})
