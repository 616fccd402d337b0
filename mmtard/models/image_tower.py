"""The image side of a CLIP: normalisation, the visual tower, and what freezes it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from ..errors import UserError
from . import last_map, vision_transformer
from .batch_layout import BatchLayout

LEAST_TO_COMPARE = 8  # so many different images with one embedding are no chance
DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}


class ImageTower(nn.Module):
    """An open_clip image tower that takes pixels: resizing and normalisation live in its forward.

    images [B,3,H,W] float32 in [0,1], any H and W -> embeddings [B,D] float32, not normalised; with `tokens`, also the
    features of P places, [B,P,place_width]: a ViT's patch tokens, brought to the embeddings' space, or the last map of
    a convolutional tower. Other sizes than `size` (H, W) are resized inside (bicubic, no antialias). `autocast`: the
    dtype in which the tower runs while its weights stay float32, or None.
    """

    def __init__(self, visual: nn.Module, mean, std):
        super().__init__()
        self.visual = visual
        size = visual.image_size
        self.size: tuple[int, int] = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
        self.autocast: torch.dtype | None = None
        self.dtype = torch.float32  # of the weights, and so of the tower's input
        self.layout = BatchLayout()
        self.convolves = isinstance(visual, ModifiedResNet)
        self.graph: Callable | None = None  # a compiled `compute`
        self.frozen_batch_norm = True
        self.checkpointed = False  # whether blocks keep their input alone for the backward
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        vision_transformer.lighten(visual)
        last_map.offer(visual)
        if self.has_tokens and _project_tokens not in visual._forward_hooks.values():
            # As a hook, it finds the projection's weight gathered where the tower is sharded.
            visual.register_forward_hook(_project_tokens)

    def forward(self, images: Tensor, tokens: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """images [B,3,H,W] float32 in [0,1] -> embeddings [B,D], at least float32; `tokens`: also of places [B,P,W].

        Images of another size than the tower's are resized first (bicubic).
        """
        return (self.graph or self.compute)(images, tokens)

    def compute(self, images: Tensor, tokens: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The forward itself, of which `graph` is a compiled one."""
        if images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", align_corners=False)
        x = ((images - self.mean) / self.std).to(self.dtype)
        if self.convolves and x.is_cuda:  # the layout that tensor cores convolve; the others follow it
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            if self.has_tokens:
                self.visual.output_tokens = tokens
                vision_transformer.ask_for_all_tokens(self.visual, tokens)
            elif last_map.width(self.visual) is not None:
                self.visual.output_map = tokens
            z = self.visual(x)
        if isinstance(z, tuple) and not tokens:  # CoCa's tower always gives the tokens of its own decoder, too
            z = z[0]
        return tuple(_at_least_float32(t) for t in z) if tokens else _at_least_float32(z)

    @property
    def image_size(self) -> int | tuple[int, int]:
        """The size as settings and results write it: one number for a square, else (H, W)."""
        return self.size[0] if self.size[0] == self.size[1] else self.size

    @property
    def has_tokens(self) -> bool:
        """Whether the forward can give the patches' tokens, in the space of the embeddings.

        A ViT can whose embedding is a projected token or the mean of the projected tokens.
        """
        v = self.visual
        return isinstance(v, VisionTransformer) and v.attn_pool is None and v.proj is not None and v.pool_type != "none"

    @property
    def place_width(self) -> int | None:
        """The width of the features of a place: of a patch's token, or of the last map; None for a tower of neither."""
        return self.visual.output_dim if self.has_tokens else last_map.width(self.visual)

    def cast(self, dtype: torch.dtype) -> ImageTower:
        """The same tower with its weights (and so its arithmetic) in `dtype`; normalisation stays float32."""
        self.visual.to(dtype)
        self.dtype = dtype
        return self

    def train(self, mode: bool = True) -> ImageTower:
        """Set training mode for everything but frozen batch norm.

        Its statistics stay those of the pretrained model, so clean and adversarial images, ranks and micro-batches
        all see one and the same network.
        """
        super().train(mode)
        for module in self.modules():
            if self.frozen_batch_norm and isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self


def require_tokens(tower: ImageTower, where: str) -> None:
    """UserError when the tower cannot give the patch tokens that the method reads."""
    if not tower.has_tokens:
        raise UserError(
            f"{where}: the method reads a ViT's patch tokens, which a {type(tower.visual).__name__} does not give;"
            " choose a ViT or another method"
        )


def require_places(tower: ImageTower, where: str) -> None:
    """UserError when the tower gives features of no places, neither a ViT's patches nor a convolutional last map."""
    if tower.place_width is None:
        kind = type(getattr(tower.visual, "trunk", tower.visual)).__name__
        raise UserError(
            f"{where}: a {kind} gives no features of places, such as patch tokens; set terms.feature.of=embedding"
        )


def why_no_embeddings(rows: Tensor, images: int) -> str | None:
    """Say why rows [B,D], made from `images` different images, cannot be a model's embeddings; None when they can.

    They cannot where one is not finite, is zero or too large to be normalised in float32, or where all are the same.
    """
    norms = rows.float().norm(dim=-1)
    if not rows.isfinite().all():
        return "not finite (NaN or infinity)"
    if not (norms > 0).all():
        return "zero"
    if not norms.isfinite().all():
        return f"too large (up to {rows.abs().max().item():.2g}) to be normalised"
    if images >= LEAST_TO_COMPARE and (rows == rows[0]).all():
        return f"the same for {images} different images"
    return None


def freeze(tower: ImageTower, dtype: torch.dtype, device: torch.device) -> ImageTower:
    """Make the tower what a teacher is: weights in `dtype` on `device`, evaluation mode, no gradient."""
    return tower.cast(dtype).eval().requires_grad_(False).to(device)


def blocks(tower: ImageTower) -> list[nn.Module]:
    """The repeated blocks of a ViT or ResNet of open_clip, or of a timm model.

    Empty for other towers, which are then sharded whole.
    """
    visual = tower.visual
    if hasattr(visual, "transformer"):
        return list(visual.transformer.resblocks)
    trunk = getattr(visual, "trunk", visual)
    if hasattr(trunk, "blocks"):
        return list(trunk.blocks)
    stages = [getattr(trunk, name) for name in ("layer1", "layer2", "layer3", "layer4") if hasattr(trunk, name)]
    stages += [getattr(stage, "blocks", [stage]) for stage in getattr(trunk, "stages", getattr(trunk, "layers", ()))]
    return [block for stage in stages for block in stage]


def _project_tokens(visual: VisionTransformer, _, output):
    return (output[0], output[1] @ visual.proj) if visual.output_tokens else output


def _at_least_float32(z: Tensor) -> Tensor:
    return z.float() if z.dtype != torch.float64 else z
