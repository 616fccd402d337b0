"""Image-text recall: the captions of images, the ranks at which they find one another, and recall at 1, 5 and 10."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Cache
from ..data.dataset import Dataset
from ..data.reader import Reader
from ..data.staging import staging_for
from ..errors import UserError
from . import results

K = (1, 5, 10)


@dataclass
class Captions:
    """The captions of some images.

    texts: [T]. image: int64 [T], the place among the images of the one that each describes.
    """

    texts: list[str]
    image: Tensor

    @classmethod
    def read(cls, dataset: Dataset, ids: list[int], cache: Cache) -> Captions:
        """The captions of the samples, in their order. Raises UserError naming a sample without any."""
        reader = Reader(dataset, staging_for(dataset, cache))
        captions = [reader.captions(i) for i in ids]
        for i, own in zip(ids, captions):
            if not own:
                raise UserError(f"'{dataset.name(i)}' has no caption; retrieval needs a .txt member beside each image")
        texts = [text for own in captions for text in own]
        return cls(texts, torch.tensor([place for place, own in enumerate(captions) for _ in own]))

    def of(self, chosen: np.ndarray) -> tuple[Captions, Tensor]:
        """The captions of the images at the places `chosen`, sorted, and which of these captions they are: bool [T]."""
        theirs = torch.isin(self.image, torch.from_numpy(chosen))
        image = torch.searchsorted(torch.from_numpy(chosen), self.image[theirs])
        return Captions([text for text, own in zip(self.texts, theirs.tolist()) if own], image), theirs


def ranks_of(images: Tensor, texts: Tensor, image_of: Tensor, block: int = 1024) -> tuple[Tensor, Tensor]:
    """For each image, the rank of its best caption; for each caption, the rank of its image. 1 is found first.

    images [N,D], texts [T,D] normalised, image_of int64 [T], in the images' order. A tie counts against the model: one
    embedding for everything finds nothing, nor does NaN.
    """
    z = F.normalize(images, dim=1)
    own = torch.cat([_own(z, texts, image_of, i, block) for i in range(0, len(z), block)])  # [T]
    best = torch.full((len(z),), -torch.inf).scatter_reduce(0, image_of, own, "amax")
    of_image = torch.empty(len(z), dtype=torch.int64)
    of_caption = torch.ones(len(texts), dtype=torch.int64)
    for i in range(0, len(z), block):
        similarity, here = _similarity(z[i : i + block], texts), torch.arange(i, min(i + block, len(z)))
        other = image_of[None, :] != here[:, None]
        of_image[here] = 1 + ((similarity >= best[here, None]) & other).sum(1)
        of_caption += ((similarity >= own[None, :]) & other).sum(0)
    return of_image, of_caption


def _own(images: Tensor, texts: Tensor, image_of: Tensor, start: int, block: int) -> Tensor:
    """Similarity of each caption of a block of images to its image.

    From the very product that the others are compared in.
    """
    at = ((image_of >= start) & (image_of < start + block)).nonzero().flatten()
    return _similarity(images[start : start + block], texts)[image_of[at] - start, at]


def _similarity(images: Tensor, texts: Tensor) -> Tensor:
    """Cosines [N,T]; those that are NaN are lowest."""
    similarity = images @ texts.T
    return similarity.masked_fill(similarity.isnan(), -torch.inf)


def recalls(of_image: Tensor, of_caption: Tensor) -> dict:
    """recall@k, each an ACC, in both directions."""
    directions = {"image_to_text": of_image, "text_to_image": of_caption}
    return {name: {str(k): results.accuracy((ranks <= k).tolist()) for k in K} for name, ranks in directions.items()}


def per_sample(of_image: Tensor, of_caption: Tensor) -> dict:
    """The ranks as results.json holds them."""
    return {"image_to_text_rank": of_image.tolist(), "text_to_image_rank": of_caption.tolist()}
