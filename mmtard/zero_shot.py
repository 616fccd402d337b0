"""Zero-shot classification: image embeddings and class embeddings -> cosines -> logits."""

from typing import NamedTuple

from torch import Tensor

from .losses import class_cosines


class Prediction(NamedTuple):
    """One model's output on one view of a batch; logits = logit_scale * cosines."""

    embeddings: Tensor  # [B,D], not normalised
    cosines: Tensor  # [B,C]
    logits: Tensor  # [B,C]
    # for methods whose settings ask for tokens
    # [B,P,W] of places, not normalised: a ViT's patches in the space of the embeddings, or a convolutional last map
    tokens: Tensor | None = None
    text: Tensor | None = None  # [C,D], the model's class embeddings


class ZeroShotHead(NamedTuple):
    """A frozen text side: `class_embeddings` [C,D] normalised float32, and the logit scale (100 for OpenAI's CLIP)."""

    class_embeddings: Tensor
    logit_scale: float

    def __call__(self, embeddings: Tensor, tokens: Tensor | None = None) -> Prediction:
        """Image embeddings [B,D] and patch tokens [B,P,D] -> Prediction, in the class embeddings' float type."""
        text = self.class_embeddings
        z = embeddings.to(text.dtype)
        cosines = class_cosines(z, text)
        patches = () if tokens is None else (tokens.to(text.dtype), text)
        return Prediction(z, cosines, self.logit_scale * cosines, *patches)
