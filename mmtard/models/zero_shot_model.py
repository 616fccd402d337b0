"""A CLIP as a user holds it: image tower, text side, preprocessing, and logits of any class names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU
from PIL import Image
from torch import Tensor, nn

from ..data.images import Transform
from ..errors import UserError
from ..zero_shot import ZeroShotHead
from .clip import Clip, TextTower
from .image_tower import ImageTower
from .model_config import architecture
from .tokenizer import load_tokenizer

TEMPLATES = ("This is a photo of a {}",)  # as an evaluation has it where a dataset brings none
Tokenizer = Callable[[list[str]], Tensor]  # N texts -> token ids int64 [N,L]
_CLIP_VOCABULARY = 49408  # of OpenAI's tokenizer, which open_clip's plain text towers share


class ZeroShotModel:
    """A CLIP model that takes pixels. `mmtard.load` makes it.

    image_tower: images [B,3,H,W] float32 in [0,1] -> embeddings [B,D] float32, not normalised; other sizes than
    `image_size` are resized inside, and pixels are normalised inside. clip: the whole open_clip model, and the
    configuration that describes it. tokenize: N texts -> token ids.
    """

    def __init__(self, clip: Clip, tokenize: Tokenizer):
        self.clip, self.tokenize = clip, tokenize
        self.image_tower: ImageTower = clip.tower()

    @property
    def image_size(self) -> int | tuple[int, int]:
        """Pixels of a side, or (H, W), of the images that the tower sees."""
        return self.image_tower.image_size

    @property
    def logit_scale(self) -> float:
        """The factor on cosines: 100 for OpenAI's models."""
        return self.clip.logit_scale

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.clip.model.parameters()).device

    def to(self, device: str | torch.device) -> ZeroShotModel:
        """Move the weights; returns the model itself."""
        self.clip.model.to(device)
        self.image_tower.to(device)
        return self

    def preprocess(self, image: Image.Image) -> Tensor:
        """Bring a PIL image to the tower's size in the model's own way -> float32 [3,H,W] in [0,1], not normalised."""
        if not isinstance(image, Image.Image):
            raise UserError(f"image: a {type(image).__name__}; give a PIL image, such as PIL.Image.open(path)")
        transform = Transform.of_model(self.image_size, self.clip.config["preprocess_cfg"], self.clip.name)
        return torch.from_numpy(transform(image.convert("RGB"), 0)).float() / 255

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """N texts -> embeddings [N,D] float32, normalised, without gradient."""
        texts = _strings(texts, "texts")
        with _left_as_it_was(self.clip.model):
            return TextTower(self.clip.model, self.tokenize)(texts)

    def class_embeddings(self, class_names: Sequence[str], templates: Sequence[str] = TEMPLATES) -> Tensor:
        """Class names -> [C,D] float32, normalised: the mean of each class's normalised prompt embeddings.

        templates: prompts with `{}` where the name goes. Raises UserError for one without.
        """
        names, prompts = _strings(class_names, "class_names"), _strings(templates, "templates")
        for prompt in prompts:
            if "{}" not in prompt:
                raise UserError(
                    f"templates: '{prompt}' has no place for the class name; write it like 'a photo of a {{}}'"
                )
        embeddings = self.embed_texts([prompt.replace("{}", name) for name in names for prompt in prompts])
        return F.normalize(embeddings.view(len(names), len(prompts), -1).mean(1), dim=-1)

    def classifier(self, class_names: Sequence[str], templates: Sequence[str] = TEMPLATES) -> ZeroShotClassifier:
        """The model as a classifier of these classes, for `mmtard.attack` and any other `images -> logits` library."""
        return ZeroShotClassifier(self.image_tower, self.class_embeddings(class_names, templates), self.logit_scale)

    def logits(self, images: Tensor, class_names: Sequence[str], templates: Sequence[str] = TEMPLATES) -> Tensor:
        """Zero-shot logits: images [B,3,H,W] float32 in [0,1] -> [B,C], the cosines times the model's own logit scale.

        Differentiable to the images. The class embeddings are computed at every call; `classifier` keeps them.
        """
        return self.classifier(class_names, templates)(images)


class ZeroShotClassifier(nn.Module):
    """images [B,3,H,W] float32 in [0,1] -> logits [B,C]; normalisation is inside."""

    def __init__(self, image_tower: ImageTower, class_embeddings: Tensor, logit_scale: float):
        super().__init__()
        self.image_tower, self.logit_scale = image_tower, logit_scale
        self.class_embeddings: Tensor
        self.register_buffer("class_embeddings", class_embeddings)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Zero-shot logits [B,C] float32. Raises UserError for what are no such images."""
        if (
            not isinstance(images, Tensor)
            or images.dim() != 4
            or images.shape[1] != 3
            or not images.is_floating_point()
        ):
            kind = (
                f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else f"a {type(images).__name__}"
            )
            raise UserError(f"images: {kind}; give float32 [B,3,H,W] in [0,1] (8-bit pixels: images.float() / 255)")
        if images.device != self.class_embeddings.device:
            raise UserError(
                f"images: on {images.device}, the model on {self.class_embeddings.device}; move one of them"
            )
        return ZeroShotHead(self.class_embeddings, self.logit_scale)(self.image_tower(images)).logits


def wrap(model: nn.Module, arch: str | None = None, tokenizer: Tokenizer | None = None) -> ZeroShotModel:
    """An open_clip model as it is: its weights are shared, not copied.

    arch: its name in open_clip's list, or its .json, which says its tokenizer; without, OpenAI's is taken where the
    vocabulary fits. Raises UserError for another kind of model, one in training mode or half precision, and a tokenizer
    that is not known.
    """
    missing = [name for name in ("visual", "encode_text", "logit_scale") if not hasattr(model, name)]
    if missing:
        raise UserError(
            f"model: a {type(model).__name__} has no {missing[0]}, so it is no CLIP of open_clip; "
            "mmtard.attack takes any images -> logits callable as it is"
        )
    if model.training:
        raise UserError("model: it is in training mode; call model.eval() first")
    wrong = {str(p.dtype) for p in model.parameters()} - {"torch.float32"}
    if wrong:
        raise UserError(f"model: its weights are {min(wrong)}; attacks need float32: call model.float() first")
    arch = arch and architecture(arch, "arch")
    preprocess = {
        k: list(v) if isinstance(v, tuple) else v for k, v in open_clip.model.get_model_preprocess_cfg(model).items()
    }
    config: dict = {"preprocess_cfg": preprocess}
    if arch is not None:
        quick = any(isinstance(module, QuickGELU) for module in model.modules())
        config["model_cfg"] = {**open_clip.get_model_config(arch), "quick_gelu": quick}
    clip = Clip(model, arch or type(model).__name__, config)
    return ZeroShotModel(clip, tokenizer or (clip.tokenizer() if arch else _plain_tokenizer(model)))


def save(model: ZeroShotModel, folder: Path) -> None:
    """Write a folder that `mmtard.load` and open_clip load. Raises UserError where the architecture is not known."""
    if "model_cfg" not in model.clip.config:
        raise UserError("model: it was wrapped without its architecture; name it: mmtard.load(model, arch='ViT-B-32')")
    model.clip.save(folder)


def _plain_tokenizer(model: nn.Module) -> Tokenizer:
    text = getattr(model, "text", model)
    vocabulary, length = getattr(text, "vocab_size", None), getattr(text, "context_length", None)
    if vocabulary != _CLIP_VOCABULARY or length is None:
        raise UserError(
            f"model: its vocabulary of {vocabulary} is not OpenAI's, so its tokenizer is not known; "
            "name its arch or tokenizer"
        )
    return load_tokenizer({"context_length": length}, "model")


def _strings(given: Sequence[str], name: str) -> list[str]:
    """The texts as a list. UserError for one string, which would be taken letter by letter, and for none."""
    if isinstance(given, str) or not all(isinstance(text, str) for text in given):
        raise UserError(f"{name}: {given!r}; give a list of strings")
    if not len(given):
        raise UserError(f"{name}: an empty list; give at least one string")
    return list(given)


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Puts back what takes a gradient and what is in training mode: a wrapped model is its owner's."""
    gradients = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for parameter, flag in gradients:
            parameter.requires_grad_(flag)
        for module, training in modes:
            module.training = training
