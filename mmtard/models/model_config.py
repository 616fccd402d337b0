"""A model's configuration, read and checked, and the open_clip model that it describes.

The configuration of a folder, a repository or a `.json` file was written by others: only the keys of `known_keys`
pass, and no name in it that would fetch or run code.
"""

from __future__ import annotations

import copy
import importlib.util
import json
from dataclasses import asdict
from pathlib import Path

import open_clip
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from torch import nn

from ..config.model_errors import no_architecture, unknown_architecture
from ..errors import UserError
from .known_keys import MODEL, PREPROCESS, check_keys

REQUIRED = ("embed_dim", "vision_cfg", "text_cfg")


def read_json(path: Path, where: str) -> dict:
    """The object in a JSON file. Raises UserError that begins with `where` and names the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{where}: cannot read model config '{path}': {reason}; fetch or write it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{where}: cannot read model config '{path}': it is no object of names and values")
    return content


def check_model_config(cfg: object, where: str, path: str) -> dict:
    """The same `model_cfg`, when every key and value of it is one that open_clip's models know.

    Raises UserError that begins with `where`, naming the key and the file or repository `path` that holds it.
    """
    if not isinstance(cfg, dict) or not all(key in cfg for key in REQUIRED):
        raise UserError(
            f"{where}: '{path}' is no open_clip model config; it needs {', '.join(REQUIRED[:2])} and text_cfg"
        )
    check_keys(cfg, MODEL, "", where, path)
    timm_name = cfg["vision_cfg"].get("timm_model_name")
    if timm_name:
        _check_timm(timm_name, where, path)
    if cfg["text_cfg"].get("hf_model_name"):
        _check_text_model(cfg["text_cfg"]["hf_model_name"], where, path)
    return cfg


def check_preprocess(cfg: object, where: str, path: str) -> dict:
    """The same `preprocess_cfg`, when every key and value of it is known: mean and std are three finite numbers each.

    Raises UserError that begins with `where`, naming the key and the file or repository `path` that holds it.
    """
    if not isinstance(cfg, dict):
        raise UserError(f"{where}: preprocess_cfg in '{path}' is no object of names and values; correct the file")
    check_keys(cfg, PREPROCESS, "preprocess_cfg.", where, path)
    for key in ("mean", "std"):
        if cfg.get(key) is not None and (len(cfg[key]) != 3 or (key == "std" and min(cfg[key]) <= 0)):
            raise UserError(
                f"{where}: preprocess_cfg.{key} is {json.dumps(cfg[key])[:80]} in '{path}'; it must be three numbers"
                + (" above 0" if key == "std" else "")
            )
    return cfg


def build(cfg: dict, preprocess: dict | None = None) -> nn.Module:
    """open_clip's model of a checked `model_cfg`, in float32 with random weights, drawn from torch's generator.

    preprocess: what its folder says of `preprocess_cfg`. Raises UserError when there is no such model.
    """
    cfg = copy.deepcopy(cfg)
    hf_text = "hf_model_name" in cfg["text_cfg"]
    if "timm_model_name" in cfg["vision_cfg"]:
        cfg["vision_cfg"]["timm_model_pretrained"] = False
    if hf_text:
        cfg["text_cfg"]["hf_model_pretrained"] = False
    custom_text = cfg.pop("custom_text", False) or hf_text
    if custom_text and "multimodal_cfg" in cfg:
        kind = open_clip.CoCa
    elif custom_text:
        kind = open_clip.CustomTextCLIP
    else:
        kind = open_clip.CLIP
    try:
        model = kind(**cfg)
    except Exception as error:  # open_clip, timm and transformers check little and raise what comes of it
        raise UserError(f"no model can be made of its config: {_line(error)}; correct model_cfg") from None
    final = merge_preprocess_dict(asdict(PreprocessCfg()), preprocess or {})
    final["size"] = getattr(model.visual, "image_size", final["size"])
    open_clip.model.set_model_preprocess_cfg(model, final)
    return model


def _check_timm(name: str, where: str, path: str) -> None:
    """Refuse what timm would fetch from elsewhere, such as hf-hub:..., and names it does not have."""
    if importlib.util.find_spec("timm") is None:
        raise UserError(f"{where}: '{path}' is a model of timm, which is not installed; pip install timm")
    import timm

    if ":" in name or "/" in name or not timm.is_model(name):
        raise UserError(
            f"{where}: vision_cfg.timm_model_name is '{name}' in '{path}', which this timm does not have; correct it"
        )


def _check_text_model(name: str, where: str, path: str) -> None:
    """Refuse a text tower whose Hugging Face configuration asks for code of its own."""
    if importlib.util.find_spec("transformers") is None:
        raise UserError(f"{where}: the text tower of '{path}' needs transformers; pip install transformers")
    import transformers
    from open_clip.hf_configs import arch_dict

    at = f"{where}: text_cfg.hf_model_name '{name}' in '{path}'"
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise UserError(f"{at} asks to run code of its own, which mmtard never does; take another model") from None
        raise UserError(f"{at} is not at hand ({_line(error)}); download it once") from None
    attention = getattr(config, "_attn_implementation", None)
    if getattr(config, "auto_map", None) or attention not in (None, "eager", "sdpa"):
        raise UserError(f"{at} asks to run code of its own, which mmtard never does; take another model")
    if config.model_type not in arch_dict:
        raise UserError(f"{at} is a {config.model_type}; known are {', '.join(arch_dict)}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def architecture(arch: str | None, key: str, weights: str = "") -> str:
    """The name under which open_clip has an architecture, after adding that of a .json file to its list.

    key: what the errors call it. Raises UserError for an unknown name, and for a file that describes no model.
    """
    if arch is None:
        raise no_architecture(key, weights)
    if not arch.endswith(".json"):
        name = arch.replace("/", "-")
        if name not in open_clip.list_models():
            raise unknown_architecture(key, arch, open_clip.list_models())
        return name
    path = Path(arch)
    cfg = check_model_config(read_json(path, key), key, arch)
    known = open_clip.get_model_config(path.stem)
    if known is not None and known != cfg:
        raise UserError(f"{key}: open_clip already has an architecture '{path.stem}'; rename '{arch}'")
    open_clip.add_model_config(path)
    return path.stem
