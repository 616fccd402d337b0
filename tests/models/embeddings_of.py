"""What a model gives, and how a setting is refused, for the tests of this folder."""

import copy
import re
from dataclasses import replace

import pytest
import torch

from mmtard.config import Model
from mmtard.errors import UserError
from mmtard.models import loading


def images(size, batch=2):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def embeddings(clip):
    """Of two images and two texts, by a frozen copy: frozen weights and others take kernels that round otherwise."""
    clip = replace(clip, model=copy.deepcopy(clip.model).eval().requires_grad_(False))
    with torch.no_grad():
        image = clip.tower()(images(clip.model.visual.image_size[0]))
        text = clip.model.encode_text(clip.tokenizer()(["a cat", "two dogs"]))
    return torch.cat([image, text])


def refused(words, where="student", **settings):
    with pytest.raises(UserError, match=f"^{re.escape(where)}") as error:
        loading.load_clip(Model(**settings), where=where)
    assert all(word in str(error.value) for word in words.split("|")) and "\n" not in str(error.value), error.value
