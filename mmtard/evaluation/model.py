"""The model that is measured: its tower on this rank's device, its zero-shot heads, and what identifies it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from ..config import Model
from ..data.images import Transform
from ..distributed.ranks import Ranks
from ..files import settings_digest
from ..models import clip, image_tower, loading
from ..models.tokenizer import read_alike
from ..models.weights import tensors_sha256
from ..runs.checkpoints import resolve
from ..runs.layout import CHECKPOINTS
from ..zero_shot import ZeroShotHead


@dataclass
class EvaluatedModel:
    """A frozen model on this rank's device.

    tower: takes images [B,3,H,W] in [0,1] of any size and runs in float32. description: the model's part of the
    results.
    """

    clip: clip.Clip
    tower: image_tower.ImageTower
    description: dict

    @property
    def identity(self) -> dict:
        """What of `description` decides the numbers.

        Not where the weights came from, nor the path that may be their architecture's name.
        """
        return {k: v for k, v in self.description.items() if k not in ("weights", "ema", "arch")}

    def transform(self) -> Transform:
        """A stored image's way to the tower's size, the model's own. Raises UserError for one that is not known."""
        return Transform.of_model(self.tower.image_size, self.description["preprocess"], self.description["weights"])

    def head(self, names: list[str], prompts: list[str], ranks: Ranks) -> ZeroShotHead:
        """The class embeddings, computed by the first rank, with the model's own logit scale. Collective."""
        classes = ranks.run_on_first(lambda: self.clip.class_embeddings(names, prompts, ranks.device))
        return ZeroShotHead(classes.to(ranks.device), self.clip.logit_scale)

    def logits(self, head: ZeroShotHead) -> Callable[[Tensor], Tensor]:
        """images [B,3,H,W] float32 in [0,1] -> logits [B,C], the cosines times the model's own logit scale."""
        return lambda images: head(self.tower(images)).logits

    def read_alike(self, texts: list[str]) -> list[tuple[str, str]]:
        """(an earlier text, another) wherever the model reads two that are not the same words alike."""
        return read_alike(self.clip.tokenizer(), texts)

    def embed(self, images: Tensor) -> Tensor:
        """images [B,3,H,W] float32 in [0,1] -> embeddings [B,D], normalised."""
        return F.normalize(self.tower(images), dim=-1)


def load_model(spec: Model, ranks: Ranks, where: str = "model") -> EvaluatedModel:
    """A frozen model on this rank's device. Collective. Raises UserError as `load_clip` does."""
    clip = loading.load_clip_on_all_ranks(_the_same_everywhere(spec, ranks), ranks, where=where)
    state = clip.model.state_dict()
    image = {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}
    text = {k: v for k, v in state.items() if not k.startswith("visual.")}
    sha256, text_sha256 = ranks.run_on_first(lambda: (tensors_sha256(image), tensors_sha256(text)))
    tower = clip.tower().eval().requires_grad_(False).to(ranks.device)
    description = {
        "weights": spec.weights,
        "ema": spec.ema,
        "arch": spec.arch or clip.name,
        "sha256": sha256,
        "text_sha256": text_sha256,
        "quick_gelu": bool(clip.config["model_cfg"].get("quick_gelu", False)),
        "image_size": tower.image_size,
        "logit_scale": clip.logit_scale,
        "preprocess": clip.config["preprocess_cfg"],
        "model_cfg": settings_digest(clip.config["model_cfg"]),
    }
    return EvaluatedModel(clip, tower, description)


def _the_same_everywhere(spec: Model, ranks: Ranks) -> Model:
    """The model with a run's newest checkpoint by name, so that no rank takes a newer one that comes meanwhile."""
    folder = Path(spec.weights)
    if ranks.world_size == 1 or not (folder / CHECKPOINTS).is_dir() or (folder / clip.CONFIG_FILE).is_file():
        return spec
    _, checkpoint = ranks.run_on_first(lambda: resolve(folder))
    return spec.model_copy(update={"weights": str(checkpoint)})
