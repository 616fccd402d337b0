"""A tiny open_clip model made on the spot, its images and labels."""

import open_clip
import pytest
import torch

import mmtard

NAMES = ["cat", "dog", "cow", "red", "square"]


@pytest.fixture
def open_clip_model(vit):
    """An untrained open_clip model of 16 px images, as a user has it; `tests-vit` in open_clip's list."""
    open_clip.add_model_config(vit)
    torch.manual_seed(0)
    return open_clip.create_model("tests-vit").eval()


@pytest.fixture
def model(vit):
    """The same architecture by way of `mmtard.load`."""
    return mmtard.load("random", arch=vit)


@pytest.fixture
def images():
    return torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def classifier(model):
    return model.classifier(NAMES)


@pytest.fixture
def labels(classifier, images):
    """What the model says, but for the first image."""
    with torch.no_grad():
        labels = classifier(images).argmax(1)
    labels[0] = (labels[0] + 1) % len(NAMES)
    return labels
