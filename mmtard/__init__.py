"""mmtard: distributed Multimodal Multi-Teacher Adversarial Robust Distillation (MMT-ARD, arXiv 2511.17448).

The public names are imported when they are first used: `import mmtard` needs no torch.
"""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0"
__all__ = ["attack", "evaluate", "load", "losses", "methods", "train"]

_MODULES = {"losses": ".losses", "methods": ".distillation.methods"}


def __getattr__(name: str):
    if name in _MODULES:
        return import_module(_MODULES[name], __name__)
    if name in __all__:
        return getattr(import_module(".api", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
