"""Adapted attention: peft's layers, made to train under ZeRO and to depend on samples' seeds alone."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention
from torch import Tensor, nn

from ...config import Lora
from ...runs.checkpoints import save_tensors
from ...seeding import purpose_salt, sample_uniform
from ..batch_layout import BatchLayout
from . import ADAPTER_WEIGHTS

NAME = "default"  # peft's, of the one adapter


class AdaptedAttention(MultiheadAttention):
    """Self-attention whose two projections have adapters: x [B,L,D] -> [B,L,D].

    peft's own forward (0.21) merges the updates into the frozen weights and takes them out again at every call: that
    rounds those weights away, knows no dropout, adds the output projection's update twice, and replaces what ZeRO has
    partitioned.
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ):
        """query [B,L,D] -> (mixed [B,L,D], None); key and value are the query again."""
        base = self.base_layer
        update = self.lora_B[NAME](self.lora_A[NAME](self.lora_dropout[NAME](query)))
        qkv = F.linear(query, base.in_proj_weight, base.in_proj_bias) + self.scaling[NAME] * update
        q, k, v = (part.unflatten(-1, (base.num_heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return base.out_proj(mixed.transpose(1, 2).flatten(2)), None

    def _restore_weights(self) -> None:
        """Nothing to restore: the frozen weights stay the parameters they are."""

    def folded(self) -> nn.MultiheadAttention:
        """The attention with the updates in its weights."""
        base, out = self.base_layer, self.base_layer.out_proj
        base.in_proj_weight.data += self.get_delta_weight(NAME)
        out.merge()
        base.out_proj = out.get_base_layer()
        return base


class SampleDropout(nn.Module):
    """Dropout whose mask depends on each sample's own seed: equal at every world size, micro-batch and restart."""

    def __init__(self, p: float, purpose: str, layout: BatchLayout):
        super().__init__()
        self.p, self.salt, self.layout = p, purpose_salt(purpose), layout

    def forward(self, x: Tensor) -> Tensor:
        """x [N * tokens or windows, ...], samples first."""
        if not self.training:
            return x
        seeds = self.layout.seeds ^ self.salt
        keep = sample_uniform(seeds, (x.numel() // len(seeds),)).reshape(x.shape) >= self.p
        return x * keep / (1 - self.p)


def inject(visual: nn.Module, targets: list[str], settings: Lora, layout: BatchLayout) -> None:
    """Adapters on the named modules of `visual`, in place."""
    config = LoraConfig(r=settings.r, lora_alpha=settings.alpha, target_modules=targets)
    config._register_custom_module({nn.MultiheadAttention: AdaptedAttention})
    inject_adapter_in_model(config, visual, NAME)
    for name, layer in visual.named_modules():
        if isinstance(layer, LoraLayer) and settings.dropout:
            layer.lora_dropout[NAME] = SampleDropout(settings.dropout, name, layout)


def merge(visual: nn.Module) -> None:
    """Replace every adapted module of `visual` by its plain one with the update in its weights."""
    for name, layer in list(visual.named_modules()):
        if isinstance(layer, AdaptedAttention):
            visual.set_submodule(name, layer.folded())
        elif isinstance(layer, LoraLayer) and not name.endswith(".base_layer.out_proj"):
            layer.merge()
            visual.set_submodule(name, layer.get_base_layer())
    visual.requires_grad_(False)


def save(weights: dict[str, Tensor], settings: Lora, base: str, folder: Path) -> None:
    """A peft folder of a checkpoint's adapter, for the peft that is installed."""
    out_proj = ".base_layer.out_proj.lora_B."
    factors = {name: 1 / _times_out_proj_is_added() if out_proj in name else 1.0 for name in weights}
    tensors = {
        f"base_model.model.{name.replace(f'.{NAME}.', '.')}": value * factors[name] for name, value in weights.items()
    }
    targets = sorted(
        {
            name.partition(".lora_A.")[0]
            for name in weights
            if ".lora_A." in name and ".base_layer.out_proj." not in name
        }
    )
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        base_model_name_or_path=base,
        inference_mode=True,
    )
    config.save_pretrained(folder)
    save_tensors(tensors, folder / ADAPTER_WEIGHTS)


@cache
def _times_out_proj_is_added() -> int:
    """How often the installed peft adds the update of an attention's output projection (0.21: twice), by asking it."""
    attention = nn.Sequential(nn.MultiheadAttention(1, 1, bias=False))
    nn.init.zeros_(attention[0].out_proj.weight)
    nn.init.ones_(attention[0].in_proj_weight)
    adapted = get_peft_model(attention, LoraConfig(r=1, lora_alpha=1, target_modules=["0"])).base_model.model[0]
    for layer in (adapted.base_layer.out_proj.lora_A, adapted.base_layer.out_proj.lora_B):
        nn.init.ones_(layer[NAME].weight)
    one = torch.ones(1, 1, 1)
    with torch.no_grad():
        return round(adapted(one, one, one)[0].item())
