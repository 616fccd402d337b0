"""The model that is measured: its tower on this rank's device, its zero-shot heads, and what identifies it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import data, towers
from ..config import Model
from ..methods import Head
from ..parallel import Ranks
from .naming import digest


@dataclass
class Subject:
    """`tower` takes images [B,3,H,W] in [0,1] of any size and runs in float32; `about` is the model's part of the results."""

    clip: towers.Clip
    tower: towers.ImageTower
    about: dict

    @property
    def identity(self) -> dict:
        """What of `about` decides the numbers: not where the weights came from, nor the path that may be their architecture's name."""
        return {k: v for k, v in self.about.items() if k not in ("weights", "ema", "arch")}

    def transform(self) -> data.Transform:
        """A stored image's way to the tower's size, the model's own. Raises UserError for one that is not known."""
        return data.Transform.of_model(self.tower.image_size, self.about["preprocess"], self.about["weights"])

    def head(self, names: list[str], prompts: list[str], ranks: Ranks) -> Head:
        """The class embeddings, computed by the first rank, with the model's own logit scale. Collective."""
        classes = ranks.from_first(lambda: self.clip.class_embeddings(names, prompts, ranks.device))
        return Head(classes.to(ranks.device), self.clip.logit_scale)

    def logits(self, head: Head) -> Callable[[Tensor], Tensor]:
        """images [B,3,H,W] float32 in [0,1] -> logits [B,C], the cosines times the model's own logit scale."""
        return lambda images: head(self.tower(images)).logits

    def embed(self, images: Tensor) -> Tensor:
        """images [B,3,H,W] float32 in [0,1] -> embeddings [B,D], normalised."""
        return F.normalize(self.tower(images), dim=-1)


def load(spec: Model, ranks: Ranks, where: str = "model") -> Subject:
    """A frozen model on this rank's device. Collective. Raises UserError as `towers.load` does."""
    clip = towers.load(spec, where=where)
    state = clip.model.state_dict()
    image = {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}
    text = {k: v for k, v in state.items() if not k.startswith("visual.")}
    sha256, text_sha256 = ranks.from_first(lambda: (tensors_sha256(image), tensors_sha256(text)))
    tower = clip.tower().eval().requires_grad_(False).to(ranks.device)
    about = {
        "weights": spec.weights,
        "ema": spec.ema,
        "arch": spec.arch or clip.name,
        "sha256": sha256,
        "text_sha256": text_sha256,
        "quick_gelu": bool(clip.config["model_cfg"].get("quick_gelu", False)),
        "image_size": tower.image_size,
        "logit_scale": clip.logit_scale,
        "preprocess": clip.config["preprocess_cfg"],
        "model_cfg": digest(clip.config["model_cfg"]),
    }
    return Subject(clip, tower, about)


@contextmanager
def full_float32() -> Iterator[None]:
    """TF32 off: by default cuDNN's convolutions, a ViT's patch embedding among them, keep 10 bits of a float32's 23."""
    kinds = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [kind.allow_tf32 for kind in kinds]
    try:
        for kind in kinds:
            kind.allow_tf32 = False
        yield
    finally:
        for kind, allowed in zip(kinds, before):
            kind.allow_tf32 = allowed


def tensors_sha256(state: dict[str, Tensor]) -> str:
    """sha256 hex of names, types, shapes and bytes, in the order of the names: the same from whichever file they came."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
