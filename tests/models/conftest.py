"""One random model for the tests of this folder."""

import pytest

from mmtard.config import Model
from mmtard.models import loading


@pytest.fixture(scope="session")
def base(vit):
    """A random ViT from seed 3: the weights that every source below stores."""
    return loading.load_clip(Model(arch=vit, weights="random"), seed=3)
