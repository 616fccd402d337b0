"""A CLIPModel of transformers as an open_clip model: its folder's configuration, and the names of its weights.

The names of both libraries stand here once; `export/hf.py` uses them in the other direction. transformers is not
imported.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from .model_config import read_json

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
PREPROCESSOR = "preprocessor_config.json"
ACTIVATIONS = {"quick_gelu": True, "gelu": False}  # transformers' name -> open_clip's quick_gelu
INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
VOCABULARY = 49408  # of CLIP's own tokenizer, the only one that is known to be the same in both libraries
OUTSIDE_BLOCKS = {
    "conv1.weight": "embeddings.patch_embedding.weight",
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    # "pre_layrnorm" is how transformers spells it.
    **{
        f"{ours}.{kind}": f"{theirs}.{kind}"
        for ours, theirs in (
            ("ln_pre", "pre_layrnorm"),
            ("ln_post", "post_layernorm"),
            ("ln_final", "final_layer_norm"),
        )
        for kind in ("weight", "bias")
    },
}
IN_BLOCKS = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
# What transformers leaves out of a config.json because it is the default.
_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_TEXT = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "vocab_size": VOCABULARY,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


def is_transformers_folder(folder: Path) -> bool:
    """Whether a folder is one that transformers' `save_pretrained` wrote: a config.json and weights beside it."""
    return (folder / CONFIG).is_file() and any((folder / name).is_file() for name in WEIGHTS)


def open_clip_config(folder: Path, where: str) -> tuple[dict, dict]:
    """(model_cfg, preprocess_cfg) of the open_clip model that is the CLIPModel in `folder`.

    Raises UserError that begins with `where`, for models that open_clip does not have or that are no CLIP.
    """
    content = read_json(folder / CONFIG, where)
    _check_kind(content.get("model_type"), folder, where)
    vision = _VISION | _section(content, "vision_config", folder, where)
    text = _TEXT | _section(content, "text_config", folder, where)
    _check_sizes(vision, text, folder, where)
    model = {
        "embed_dim": content.get("projection_dim", 512),
        "quick_gelu": ACTIVATIONS[vision["hidden_act"]],
        "vision_cfg": {
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "width": vision["hidden_size"],
            "layers": vision["num_hidden_layers"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            "mlp_ratio": _ratio(vision),
            "norm_kwargs": {"eps": vision["layer_norm_eps"]},
        },
        "text_cfg": {
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "width": text["hidden_size"],
            "heads": text["num_attention_heads"],
            "layers": text["num_hidden_layers"],
            "mlp_ratio": _ratio(text),
            "norm_kwargs": {"eps": text["layer_norm_eps"]},
        },
    }
    return model, _preprocess(folder, where)


def _check_kind(kind: object, folder: Path, where: str) -> None:
    if kind in ("siglip", "siglip2"):
        raise UserError(
            f"{where}: '{folder}' is a SigLIP of transformers, which is not converted; take open_clip's copy of it,"
            " e.g. weights: hf-hub:timm/ViT-B-16-SigLIP"
        )
    if kind != "clip":
        raise UserError(
            f"{where}: '{folder}' is a {kind} of transformers; CLIP models are read, or an open_clip folder"
        )


def _check_sizes(vision: dict, text: dict, folder: Path, where: str) -> None:
    """Raises UserError for sizes that are none, and for an activation or a tokenizer that open_clip's CLIP has not."""
    for sizes, default in ((vision, _VISION), (text, _TEXT)):
        wrong = [key for key, value in default.items() if type(sizes[key]) is not type(value) or not sizes[key]]
        if wrong:
            raise UserError(f"{where}: {wrong[0]} is {sizes[wrong[0]]!r:.60} in '{folder / CONFIG}'; correct the file")
    if vision["hidden_act"] != text["hidden_act"] or vision["hidden_act"] not in ACTIVATIONS:
        raise UserError(f"{where}: '{folder}' has the activation {vision['hidden_act']}; quick_gelu and gelu are known")
    if text["vocab_size"] != VOCABULARY:
        raise UserError(
            f"{where}: '{folder}' has a tokenizer of {text['vocab_size']} tokens; CLIP's of {VOCABULARY} is known"
        )


def from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights by open_clip's names where they have a CLIPModel's; other weights as they are."""
    if "vision_model.embeddings.patch_embedding.weight" not in state:
        return state
    outside = {theirs: ours for ours, theirs in OUTSIDE_BLOCKS.items()}
    inside = {theirs: ours for ours, theirs in IN_BLOCKS.items()}
    plain: dict[str, Tensor] = {}
    thirds: dict[str, dict[str, Tensor]] = {}  # in_proj -> q, k, v
    for name, value in state.items():
        tower, _, rest = name.partition(".")
        prefix = "visual." if tower in ("vision_model", "visual_projection") else ""
        if rest.endswith("position_ids"):
            continue
        if tower in ("visual_projection", "text_projection"):
            plain["visual.proj" if prefix else "text_projection"] = value.T.contiguous()
        elif not rest.startswith("encoder.layers."):
            plain[f"{prefix}{outside.get(rest, rest)}" if rest else name] = value
        else:
            block, module, kind = rest.split(".")[2], ".".join(rest.split(".")[3:-1]), rest.rpartition(".")[2]
            at = f"{prefix}transformer.resblocks.{block}"
            if module in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
                thirds.setdefault(f"{at}.attn.in_proj_{kind}", {})[module[-6]] = value
            else:
                plain[f"{at}.{inside.get(module, module)}.{kind}"] = value
    for name, parts in thirds.items():
        plain[name] = torch.cat([parts[part] for part in "qkv" if part in parts])
    return plain


def _ratio(sizes: dict) -> float:
    """The ratio from which open_clip computes the same width of the MLP, rounding down."""
    ratio = sizes["intermediate_size"] / sizes["hidden_size"]
    exact = int(sizes["hidden_size"] * ratio) == sizes["intermediate_size"]
    return ratio if exact else math.nextafter(ratio, math.inf)


def _section(content: dict, name: str, folder: Path, where: str) -> dict:
    section = content.get(name) or {}
    if not isinstance(section, dict):
        raise UserError(f"{where}: {name} in '{folder / CONFIG}' is no object of names and values; correct the file")
    return section


def _preprocess(folder: Path, where: str) -> dict:
    if not (folder / PREPROCESSOR).is_file():
        return {}
    content = read_json(folder / PREPROCESSOR, where)
    squash = isinstance(content.get("size"), dict) and "height" in content["size"]
    known = {
        "mean": content.get("image_mean"),
        "std": content.get("image_std"),
        "interpolation": INTERPOLATIONS.get(content.get("resample"), "bicubic"),
        "resize_mode": "squash" if squash else "shortest",
    }
    return {key: value for key, value in known.items() if value is not None}
