"""Modules whose weights are about to be read from a file: allocated, but not drawn at random first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode

# Of torch.Tensor and torch.nn.init alike: they change a tensor in place and give it back.
_IN_PLACE = frozenset(
    "normal_ uniform_ kaiming_uniform_ kaiming_normal_ xavier_uniform_ xavier_normal_ trunc_normal_ erfinv_".split()
)
_MAKERS = (torch.randn, torch.rand)


class _NothingDrawn(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _MAKERS:
            return torch.empty(*args, **kwargs)
        if getattr(function, "__name__", None) in _IN_PLACE:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


@contextmanager
def unfilled() -> Iterator[None]:
    """Let what is made in this block leave out every random draw: its weights are allocated and hold anything.

    To draw a ViT-L/14's weights takes seconds, and those of a file then take their place. What a constructor computes,
    such as an attention mask, is as always: no file holds it, so a tower made on the meta device would lack it. For
    models all of whose weights are loaded strictly, or that are thrown away.
    """
    with _NothingDrawn():
        yield
