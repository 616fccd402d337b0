"""A CLIP model as it is stored: both towers, their configuration, and the folder that open_clip reads."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..files import discard, write_text
from ..runs.checkpoints import save_tensors
from .image_tower import ImageTower
from .tokenizer import load_tokenizer

CONFIG_FILE, WEIGHTS_FILE, START_FOLDER = "open_clip_config.json", "open_clip_model.safetensors", "start"


class TextTower(nn.Module):
    """An open_clip model without its image tower, and its own tokenizer.

    N texts -> embeddings [N,D] float32, normalised, without gradient.
    """

    def __init__(self, model: nn.Module, tokenize: Callable[[list[str]], Tensor]):
        super().__init__()
        self.model = copy.copy(model)
        self.model._modules = {name: module for name, module in model._modules.items() if name != "visual"}
        self.tokenize = tokenize
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, texts: list[str], batch_size: int = 256) -> Tensor:
        """N texts -> normalised embeddings float32 [N,D], on the tower's device."""
        device = next(self.parameters()).device
        chunks = [texts[i : i + batch_size] for i in range(0, len(texts), batch_size)]
        return torch.cat(
            [F.normalize(self.model.encode_text(self.tokenize(c).to(device)).float(), dim=-1) for c in chunks]
        )


@dataclass
class Clip:
    """A whole open_clip model and the folder configuration that describes it."""

    model: nn.Module
    name: str  # what open_clip calls it: an architecture, local-dir:..., or hf-hub:...
    config: dict  # {"model_cfg": ..., "preprocess_cfg": ...}, the content of open_clip_config.json

    @property
    def logit_scale(self) -> float:
        """exp of the model's logit scale: the factor on cosines, 100 for OpenAI's models."""
        return float(self.model.logit_scale.detach().double().exp())

    def sha256(self, image: bool) -> str:
        """The digest of the image tower's weights and buffers (`image`), or of all the others; by name, in float32."""
        digest = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            if name.startswith("visual.") == image:
                digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def tower(self) -> ImageTower:
        """The image tower with the model's own normalisation inside; it shares the weights."""
        cfg = self.config["preprocess_cfg"]
        return ImageTower(self.model.visual, cfg["mean"], cfg["std"])

    def text_tower(self) -> TextTower:
        """The text side with the model's own tokenizer; it shares the weights."""
        return TextTower(self.model, self.tokenizer())

    def tokenizer(self) -> Callable[[list[str]], Tensor]:
        """The model's own: N texts -> token ids int64 [N,L]. Raises UserError as `load_tokenizer` does."""
        return load_tokenizer(self.config["model_cfg"]["text_cfg"], self.name)

    def class_embeddings(self, classnames: list[str], templates: list[str], device="cpu") -> Tensor:
        """t_k, [C,D] float32 normalised, on the CPU.

        Each prompt's embedding is normalised, the mean over the templates is taken, and that is normalised again.
        """
        prompts = [t.replace("{}", name) for name in classnames for t in templates]
        text = self.text_tower().to(device)
        z = text(prompts).cpu()
        text.cpu()  # the model's own weights, which went along
        return F.normalize(z.view(len(classnames), len(templates), -1).mean(1), dim=-1)

    def save(self, folder: Path) -> None:
        """Write a folder that `open_clip.create_model_and_transforms("local-dir:FOLDER")` loads. Published by rename.

        A scratch folder of its own name is made anew, so a link planted there is removed and never followed.
        """
        folder = Path(folder)
        scratch = folder.with_name(folder.name + ".tmp")
        discard(scratch)
        scratch.mkdir(parents=True)
        tensors = {name: value.detach().clone().contiguous() for name, value in self.model.state_dict().items()}
        save_tensors(tensors, scratch / WEIGHTS_FILE)
        write_text(scratch / CONFIG_FILE, json.dumps(self.config, indent=2) + "\n")
        if self.config["model_cfg"]["text_cfg"].get("hf_tokenizer_name"):  # open_clip looks for it in the folder itself
            self.tokenizer().save_pretrained(scratch)
        discard(folder)
        scratch.rename(folder)
