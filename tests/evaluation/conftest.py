"""A tiny untrained CLIP and small datasets, for evaluations that run in the test's own process."""

from dataclasses import replace
from fractions import Fraction

import pytest
from tiny_datasets import write

from mmtard.config import Model
from mmtard.evaluation import datasets
from mmtard.evaluation.evaluate import evaluate
from mmtard.evaluation.protocols import PROTOCOLS
from mmtard.evaluation.request import EvaluationRequest
from mmtard.examples.pretrain import ARCHITECTURE
from mmtard.models import loading


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """The folder of an untrained CLIP on 32 px images."""
    folder = tmp_path_factory.mktemp("model") / "exported"
    loading.load_clip(Model(arch=str(ARCHITECTURE), weights="random"), seed=3).save(folder)
    return folder


@pytest.fixture(scope="session")
def colours(tmp_path_factory):
    """A dataset `colours` of 48 images in 4 classes; which are right under a model is up to the model."""
    return write(tmp_path_factory.mktemp("root") / "colours", 48)


@pytest.fixture
def measure(exported, ranks, tmp_path):
    """Call with a folder and changes of the quick protocol at 4/255, and of the evaluation: its results."""

    def run(root, out=None, wanted=None, model=exported, say=lambda *_: None, interruption=None, **changes):
        own = {
            k: changes.pop(k)
            for k in ("transfer_from", "batch_size", "sanity", "datasets_prompts", "compile")
            if k in changes
        }
        settings = {"eps": (Fraction(4, 255),), "iters": 4, "n_samples": None, "attacks": ("pgd", "apgd-ce"), **changes}
        protocol = replace(PROTOCOLS["quick"], **settings)
        model = model if isinstance(model, Model) else Model(weights=str(model))
        asked = EvaluationRequest(
            model, datasets.find_datasets(str(root), wanted), protocol, out or tmp_path / "out", workers=0, **own
        )
        return evaluate(asked, ranks, say, interruption)

    return run
