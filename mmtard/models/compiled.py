"""Forwards as compiled graphs, each at the one shape that it was compiled for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .image_tower import ImageTower

Say = Callable[[str], None]


class CompiledForward:
    """A tower's forward through torch.compile: a graph for each way it is asked (with gradient, with tokens).

    Each graph is made at the first shape that comes. Images of another shape, such as a smaller batch, are computed
    without it, and `say` is told once of each: nothing is ever compiled again in silence. Where compiling fails, as
    without a C++ compiler or Triton, `say` is told once and all goes on without.

    graphs: replay CUDA graphs, which spares a small batch the launches of some 500 kernels a pass. What they return
    lies in memory that the next call writes over, so it is copied, and so is the gradient to the images.
    """

    def __init__(self, tower: ImageTower, name: str, say: Say, graphs: bool = False):
        self.plain, self.name, self.say, self.graphs = tower.compute, name, say, graphs
        self.compiled = torch.compile(self.plain, dynamic=False, mode="reduce-overhead" if graphs else None)
        self.failed = False
        self._shape: dict[tuple, torch.Size] = {}
        self._told: set[torch.Size] = set()

    def __call__(self, images: Tensor, tokens: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        kind = (torch.is_grad_enabled(), images.requires_grad, tokens)
        shape = self._shape.setdefault(kind, images.shape)
        if self.failed:
            return self.plain(images, tokens)
        if images.shape != shape:
            if images.shape not in self._told:
                self._told.add(images.shape)
                self.say(
                    f"{self.name}: compiled for images {list(shape)}; those of {list(images.shape)} run uncompiled"
                )
            return self.plain(images, tokens)
        try:
            return self._replayed(images, tokens) if self.graphs else self.compiled(images, tokens)
        except compiler_errors() as error:
            self.failed = True
            reason = " ".join(str(error).split())[:200]
            self.say(f"{self.name} runs uncompiled: {type(error).__name__}: {reason}")
            return self.plain(images, tokens)

    def _replayed(self, images: Tensor, tokens: bool) -> Tensor | tuple[Tensor, Tensor]:
        torch.compiler.cudagraph_mark_step_begin()
        found = self.compiled(images * 1, tokens)  # the product's own backward copies the gradient
        return tuple(t.clone() for t in found) if isinstance(found, tuple) else found.clone()


def compile_tower(tower: ImageTower, name: str, say: Say, graphs: bool = False) -> None:
    """Let a tower's forward be a compiled graph from its next call on."""
    tower.graph = CompiledForward(tower, name, say, graphs)


def compiler_errors() -> tuple[type[Exception], ...]:
    """What torch.compile raises where it cannot make a graph; no error of the model itself, such as of memory."""
    from torch._dynamo.exc import TorchDynamoException  # imports the compiler, for which a run without it has no time

    return (TorchDynamoException,)


def wants_compiling(setting: str, device: torch.device) -> bool:
    """Whether `engine.compile` asks for graphs on this device.

    `auto` compiles on GPUs. On a CPU nine tenths of a ViT's time are matrix products at full rate already, and the
    first step takes a minute longer.
    """
    return setting in ("on", "graphs") or (setting == "auto" and device.type == "cuda")
