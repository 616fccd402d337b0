"""The public functions of `import mmtard`."""

from __future__ import annotations

from pathlib import Path


def load(source: str, arch: str | None = None):
    """The CLIP model of any source that the command line takes. Raises UserError for one that is not known."""
    from .config import Model
    from .models.loading import load_clip

    return load_clip(Model(weights=str(source), arch=arch), where="source")


def train(config, overrides: list[str] = ()) -> int:
    """Train, or go on training, the run of a configuration (a path or a `Config`); 0 when it is complete, 75 when it was asked to stop."""
    from . import config as settings
    from .distributed.interruption import Interruption
    from .training.train import train

    if isinstance(config, (str, Path)):
        config = settings.load(config, overrides)
    with Interruption() as interruption:
        return train(config, interruption)


def evaluate(request, ranks, **options) -> dict:
    """Measure a model as an `EvaluationRequest` says. Collective over the ranks."""
    from .evaluation.evaluate import evaluate

    return evaluate(request, ranks, **options)


def attack(*args, **kwargs):
    """Adversarial images of plain tensors."""
    from .attacks.ensemble import run_attacks

    return run_attacks(*args, **kwargs)
