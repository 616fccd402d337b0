"""Every key that the configuration of a model may have, with the kinds of its values; any other is refused.

What a key sets is passed on to open_clip, timm and transformers, some of which run code on request. So a key stands
here only where none of them does for it.
"""

from __future__ import annotations

import json
import math

from ..errors import UserError

Known = dict[str, "tuple[type, ...] | Known"]

_COUNT, _NUMBER, _FLAG, _NAME = (int,), (int, float), (bool,), (str,)
LARGEST = 20_000_000  # of any number: larger ones are damage, and would take the machine's memory
_BLOCKS: Known = {
    "width": _COUNT,
    "layers": _COUNT,
    "mlp_ratio": _NUMBER,
    "ls_init_value": _NUMBER,
    "pool_type": _NAME,
    "final_ln_after_pool": _FLAG,
    "output_tokens": _FLAG,
    "act_kwargs": {"approximate": _NAME},
    "norm_kwargs": {"eps": _NUMBER},
    "block_type": _NAME,
    "qk_norm": _FLAG,
    "scaled_cosine_attn": _FLAG,
    "scale_heads": _FLAG,
    "scale_attn_inner": _FLAG,
    "scale_attn": _FLAG,
    "scale_fc": _FLAG,
}
_VISION: Known = _BLOCKS | {
    "layers": (int, list),
    "head_width": _COUNT,
    "patch_size": (int, list),
    "image_size": (int, list),
    "patch_dropout": _NUMBER,
    "attentional_pool": (bool, str),
    "attn_pooler_queries": _COUNT,
    "attn_pooler_heads": _COUNT,
    "no_ln_pre": _FLAG,
    "pos_embed_type": _NAME,
    "timm_model_name": _NAME,
    "timm_model_pretrained": _FLAG,
    "timm_pool": _NAME,
    "timm_proj": _NAME,
    "timm_proj_bias": _FLAG,
    "timm_drop": _NUMBER,
    "timm_drop_path": _NUMBER,
}
TOKENIZER_KEYS: Known = {"clean": _NAME, "strip_sep_token": _FLAG, "language": _NAME}
_TEXT: Known = _BLOCKS | {
    "context_length": _COUNT,
    "vocab_size": _COUNT,
    "heads": _COUNT,
    "hf_tokenizer_name": _NAME,
    "tokenizer_mode": _NAME,
    "tokenizer_kwargs": TOKENIZER_KEYS,
    "embed_cls": _FLAG,
    "pad_id": _COUNT,
    "eos_id": _COUNT,
    "no_causal_mask": _FLAG,
    "proj_bias": _FLAG,
    "proj_type": _NAME,
    "hf_model_name": _NAME,
    "hf_model_pretrained": _FLAG,
    "hf_proj_type": _NAME,
    "hf_pooler_type": _NAME,
}
MODEL: Known = {
    "embed_dim": _COUNT,
    "vision_cfg": _VISION,
    "text_cfg": _TEXT,
    "multimodal_cfg": _TEXT | {"dim_head": _COUNT, "n_queries": _COUNT, "attn_pooler_heads": _COUNT},
    "custom_text": _FLAG,
    "quick_gelu": _FLAG,
    "init_logit_scale": _NUMBER,
    "init_logit_bias": _NUMBER,
    "nonscalar_logit_scale": _FLAG,
}
PREPROCESS: Known = {
    "size": (int, list),
    "mode": _NAME,
    "mean": (list,),
    "std": (list,),
    "interpolation": _NAME,
    "resize_mode": _NAME,
    "fill_color": (int, list),
}


def check_keys(cfg: dict, known: Known, prefix: str, where: str, path: str) -> None:
    """Raises UserError that begins with `where` for a key that is not known, or a value that it cannot have.

    prefix: of the keys as the error shows them. path: the file or repository that holds them.
    """
    for key, value in cfg.items():
        kinds = known.get(key)
        if kinds is None:
            raise UserError(
                f"{where}: '{path}' sets {prefix}{key}, which mmtard does not pass on to any library; remove it from"
                " the file"
            )
        if value is None:
            continue
        if isinstance(kinds, dict):
            if not isinstance(value, dict):
                raise UserError(
                    f"{where}: {prefix}{key} in '{path}' is no object of names and values; correct the file"
                )
            check_keys(value, kinds, f"{prefix}{key}.", where, path)
        elif not _fits(value, kinds):
            shown = json.dumps(value)[:80]
            raise UserError(f"{where}: {prefix}{key} is {shown} in '{path}', which it cannot be; correct the file")


def _fits(value: object, kinds: tuple[type, ...]) -> bool:
    if isinstance(value, list):
        return list in kinds and all(_fits(item, (int, float)) for item in value)
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, (int, float)):
        return type(value) in kinds and math.isfinite(value) and abs(value) <= LARGEST
    return type(value) in kinds
