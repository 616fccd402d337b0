"""open_clip weights as a folder that transformers' CLIPModel, CLIPImageProcessor and CLIPTokenizer load."""

from __future__ import annotations

import json
import math
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..models.clip import Clip
from ..models.transformers_clip import IN_BLOCKS, OUTSIDE_BLOCKS
from ..runs.checkpoints import save_tensors

FOLDER = "transformers"
ACTIVATIONS = {"QuickGELU": "quick_gelu", "GELU": "gelu"}
LARGEST_ERROR = 1e-4  # of a normalised embedding's component, float32
RESAMPLE = {"bicubic": 3, "bilinear": 2}  # PIL's numbers
PROMPTS = ["A photo of a café's cat, 3 years old!", "it's  SO   red & green…", "naïve 中文 <test> #1"]


def save_transformers(clip: Clip, folder: Path) -> None:
    """Write `config.json`, `model.safetensors`, the image processor's settings and the tokenizer to `folder`.

    The converted model's embeddings are compared with open_clip's before anything is written. Raises UserError without
    transformers, and for an architecture that its CLIPModel does not have, naming what differs.
    """
    try:
        import transformers
    except ImportError:
        raise UserError("--hf: needs transformers; pip install transformers, or leave --hf out") from None
    reason = _obstacle(clip)
    if reason:
        raise UserError(
            f"--hf: transformers' CLIPModel has no such architecture: {reason}; "
            "leave --hf out, the open_clip folder holds the model"
        )
    tokenizer = clip.tokenizer()
    model = transformers.CLIPModel(_config(clip, tokenizer, transformers)).eval()
    missing, unexpected = model.load_state_dict(convert(clip.model.state_dict()), strict=False)
    if missing or unexpected:
        names = ", ".join([*missing, *unexpected][:3])
        raise UserError(
            f"--hf: weights of {clip.name} that transformers' CLIPModel has no place for: {names}; leave --hf out"
        )
    error = _largest_error(clip.model, model)
    if not error <= LARGEST_ERROR:
        raise UserError(
            f"--hf: the converted model's embeddings differ by {error:.2g}; "
            "leave --hf out, the open_clip folder holds the model"
        )
    folder.mkdir(parents=True)
    model.config.architectures = ["CLIPModel"]
    model.config.save_pretrained(folder)
    save_tensors(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    (folder / "preprocessor_config.json").write_text(json.dumps(_preprocessor(clip), indent=2) + "\n")
    _tokenizer(tokenizer, transformers).save_pretrained(folder)


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename an open_clip state_dict (CLIP or CustomTextCLIP with a ViT) to what transformers' CLIPModel loads."""
    out = {}
    for name, value in state.items():
        tower, rest = "text_model", name.removeprefix("text.")
        if name.startswith("visual."):
            tower, rest = "vision_model", name.removeprefix("visual.")
        if rest in ("proj", "text_projection"):
            out[f"{'visual' if tower == 'vision_model' else 'text'}_projection.weight"] = value.T
        elif name == "logit_scale":
            out[name] = value.reshape(())
        elif rest.startswith("transformer.resblocks."):
            _, _, block, part = rest.split(".", 3)
            out.update(_block(f"{tower}.encoder.layers.{block}", part, value))
        elif rest != "attn_mask":
            out[f"{tower}.{OUTSIDE_BLOCKS.get(rest, rest)}"] = value
    return {name: value.contiguous() for name, value in out.items()}


def _block(at: str, part: str, value: Tensor) -> dict[str, Tensor]:
    if part.startswith("attn.in_proj_"):
        kind = part.removeprefix("attn.in_proj_")
        return {f"{at}.self_attn.{name}_proj.{kind}": third for name, third in zip("qkv", value.chunk(3))}
    module, _, kind = part.rpartition(".")
    return {f"{at}.{IN_BLOCKS.get(module, module)}.{kind}": value}


def _obstacle(clip: Clip) -> str | None:
    """Say what of this model CLIPModel cannot express; None when it can.

    What slips through is met by the comparison of embeddings.
    """
    model, vision = clip.model, clip.model.visual
    text = getattr(model, "text", model)
    if not isinstance(vision, open_clip.transformer.VisionTransformer):
        return f"its image tower is a {type(vision).__name__}"
    if not hasattr(text, "token_embedding"):
        return f"its text tower is a {type(text).__name__}"
    if vision.image_size[0] != vision.image_size[1]:
        return f"its images are not square ({vision.image_size[0]}x{vision.image_size[1]})"
    if vision.attn_pool is not None or vision.pool_type != "tok":
        return "its image tower does not end in the class token"
    if getattr(text, "text_pool_type", getattr(text, "pool_type", "argmax")) != "argmax":
        return "its text tower does not end in the end-of-text token"
    if len(set(_activations(model))) != 1 or _activations(model)[0] not in ACTIVATIONS:
        return f"its activation is {', '.join(sorted(set(_activations(model)))) or 'unknown'}"
    if clip.config["preprocess_cfg"].get("resize_mode", "shortest") not in ("shortest", "squash"):
        return f"its images are resized by '{clip.config['preprocess_cfg']['resize_mode']}'"
    if clip.config["model_cfg"]["text_cfg"].get("hf_tokenizer_name"):
        return f"its tokenizer is {clip.config['model_cfg']['text_cfg']['hf_tokenizer_name']}, not CLIP's"
    return None


def _activations(model: nn.Module) -> list[str]:
    return [type(module).__name__ for name, module in model.named_modules() if name.endswith("mlp.gelu")]


def _config(clip: Clip, tokenizer, transformers):
    model, vision = clip.model, clip.model.visual
    text = getattr(model, "text", model)
    common = {"hidden_act": ACTIVATIONS[_activations(model)[0]], "projection_dim": vision.proj.shape[1]}
    vision_config = {
        **common,
        **_sizes(vision.transformer),
        "layer_norm_eps": vision.ln_post.eps,
        "image_size": vision.image_size[0],
        "patch_size": vision.patch_size[0],
    }
    text_config = {
        **common,
        **_sizes(text.transformer),
        "layer_norm_eps": text.ln_final.eps,
        "vocab_size": text.token_embedding.num_embeddings,
        "max_position_embeddings": text.positional_embedding.shape[0],
        "pad_token_id": 0,
        "bos_token_id": tokenizer.sot_token_id,
        "eos_token_id": tokenizer.eot_token_id,
    }
    scale = float(model.logit_scale.detach())
    return transformers.CLIPConfig(
        text_config=text_config,
        vision_config=vision_config,
        projection_dim=vision.proj.shape[1],
        logit_scale_init_value=scale,
    )


def _sizes(transformer: nn.Module) -> dict[str, int]:
    block = transformer.resblocks[0]
    return {
        "hidden_size": transformer.width,
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
    }


@torch.no_grad()
def _largest_error(model: nn.Module, converted) -> float:
    """Between normalised embeddings of the two, over random images and token sequences of several lengths."""
    model = model.eval()
    config = converted.config
    generator = torch.Generator().manual_seed(0)
    size = config.vision_config.image_size
    images = torch.randn(4, 3, size, size, generator=generator)
    length, end = config.text_config.max_position_embeddings, config.text_config.eos_token_id
    tokens = torch.zeros(4, length, dtype=torch.long)
    for row, n in zip(tokens, (2, 3, length // 2, length)):
        row[: n - 1] = torch.randint(1, end - 1, (n - 1,), generator=generator)
        row[0], row[n - 1] = end - 1, end
    pairs = (
        (model.encode_image(images), converted.get_image_features(pixel_values=images)),
        (model.encode_text(tokens), converted.get_text_features(input_ids=tokens)),
    )
    errors = [
        (F.normalize(a, dim=-1) - F.normalize(getattr(b, "pooler_output", b), dim=-1)).abs().max().item()
        for a, b in pairs
    ]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def _preprocessor(clip: Clip) -> dict:
    settings, size = clip.config["preprocess_cfg"], clip.model.visual.image_size[0]
    squash = settings.get("resize_mode", "shortest") == "squash"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": size, "width": size} if squash else {"shortest_edge": size},
        "resample": RESAMPLE[settings.get("interpolation", "bicubic")],
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": settings["mean"],
        "image_std": settings["std"],
    }


def _tokenizer(ours, transformers):
    """CLIP's byte-pair encoding from open_clip's copy of it. Raises UserError when it does not give the same tokens."""
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): i for token, i in ours.encoder.items()}
    merges = sorted(ours.bpe_ranks, key=ours.bpe_ranks.get)
    theirs = transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=ours.context_length)
    for prompt in PROMPTS:
        expected = [ours.sot_token_id, *ours.encode(prompt), ours.eot_token_id]
        if theirs(prompt)["input_ids"] != expected:
            raise UserError(
                f"--hf: this transformers version tokenizes '{prompt}' otherwise than open_clip; leave --hf out"
            )
    return theirs
