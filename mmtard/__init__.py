"""mmtard: distributed Multimodal Multi-Teacher Adversarial Robust Distillation (MMT-ARD, arXiv 2511.17448).

    import mmtard
    model = mmtard.load("openai", arch="ViT-B-32")
    result = mmtard.attack(model.classifier(["cat", "dog"]), images, labels, eps="2/255")

The public names are imported when they are first used: `import mmtard` needs no torch. docs/api.md shows each of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .resources import VERSION

if TYPE_CHECKING:
    from . import losses
    from .api import attack, evaluate, load, train
    from .distillation import methods

__version__ = VERSION
__all__ = ["attack", "evaluate", "load", "losses", "methods", "train"]

_MODULES = {"losses": ".losses", "methods": ".distillation.methods"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(_MODULES[name], __name__)
    if name in __all__:
        return getattr(import_module(".api", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]  # what the Tab key shows
