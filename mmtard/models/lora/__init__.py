"""Low-rank adapters on a tower's attention (LoRA, Hu et al., ICLR 2022): attached, merged, written as peft reads them.

An adapted weight is W + alpha / r * B A with W frozen and B zero at first. In training, dropout acts on what A sees.
"""

from __future__ import annotations

import re
import zlib
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from ...config import Lora
from ...errors import UserError
from ..batch_layout import BatchLayout

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_OPEN_CLIP, _TIMM = re.compile(r"resblocks\.\d+\.attn$"), re.compile(r"\.attn\.(qkv|q_proj|k_proj|v_proj|proj)$")


def attach(visual: nn.Module, settings: Lora, layout: BatchLayout, seed: int = 0) -> None:
    """Freeze an image tower and put adapters on its attention's qkv and output projections; only they require grad.

    layout: whose seeds decide what dropout drops. Raises UserError when the tower has no such attention, or peft is
    missing.
    """
    targets = _attention(visual)
    if not targets:
        raise UserError(
            f"student.lora: no attention blocks for adapters in a {type(visual).__name__} tower; train it whole, with"
            " student.lora=null"
        )
    require()
    from . import layers

    visual.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(f"{seed} adapter".encode()))
        layers.inject(visual, targets, settings, layout)


def require() -> None:
    """Raise UserError unless peft is installed."""
    if find_spec("peft") is None:
        raise UserError("student.lora: adapters need peft, which is not installed; pip install mmtard[lora]")


def merge(visual: nn.Module) -> None:
    """Fold the adapters of a tower into its weights. It is then the plain architecture again, without gradients."""
    from . import layers

    layers.merge(visual)


def is_adapter(weights: dict[str, Tensor]) -> bool:
    """Whether the trained weights of a checkpoint are those of adapters."""
    return any(".lora_A." in name for name in weights)


def save(weights: dict[str, Tensor], settings: Lora, base: str, folder: Path) -> None:
    """Write a checkpoint's adapter for `peft.PeftModel.from_pretrained(CLIP, folder)`.

    base: what names the whole open_clip model CLIP.
    """
    require()
    from . import layers

    layers.save(weights, settings, base, folder)


def _attention(visual: nn.Module) -> list[str]:
    """The names of what is adapted: open_clip's attention modules, or the linear layers of timm's."""
    kinds = ((_OPEN_CLIP, nn.MultiheadAttention), (_TIMM, nn.Linear))
    found = [
        name
        for name, module in visual.named_modules()
        for pattern, kind in kinds
        if pattern.search(name) and isinstance(module, kind)
    ]
    for name in found:
        # timm's EVA and BEiT then read the weight of `qkv` and never call it: its adapter would see no image.
        if (
            name.endswith(".qkv")
            and getattr(visual.get_submodule(name.removesuffix(".qkv")), "q_bias", None) is not None
        ):
            raise UserError(
                f"student.lora: {name} of this {type(visual).__name__} takes no adapter, its bias stands apart; train"
                " it whole, with student.lora=null"
            )
    return found
