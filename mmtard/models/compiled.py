"""Forwards as compiled graphs, whole or block by block: at the one shape of each, or for batches of any size."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..errors import compiler_errors, compiler_words
from .image_tower import ImageTower, blocks

Say = Callable[[str], None]
MOST_GRAPHS = 64  # of one function: all the towers of a process share `ImageTower.compute`


class CompiledForward:
    """A tower's forward through torch.compile: a graph for each way it is asked (with gradient, with tokens).

    Each graph is made at the first shape that comes. Images of another shape, such as a smaller batch, are computed
    without it, and `say` is told once of each: nothing is ever compiled again in silence. Should a way be compiled
    again for another reason, such as a flag that changes from step to step, `say` is told of that, too. Where compiling
    fails, as without a C++ compiler or Triton, `say` is told once and all goes on without.

    graphs: replay CUDA graphs, which spares a small batch the launches of some 500 kernels a pass. What they return
    lies in memory that the next call writes over, so it is copied, and so is the gradient to the images.
    any_batch: a graph is for every batch of two images or more, whatever their number; a single image runs without. So
    does, on a CPU, what asks a ViT for no gradient, whose forward a graph slows down: it gains on the backward alone.
    A convolutional tower's forward gains, too, by the layout of its maps.

    ran: True where a graph computed, False where the tower ran without that a graph is for; the caller may clear it.
    """

    def __init__(self, tower: ImageTower, name: str, say: Say, graphs: bool = False, any_batch: bool = False):
        self.plain, self.name, self.say, self.graphs, self.any_batch = tower.compute, name, say, graphs, any_batch
        self.tower, self.failed, self.again = tower, False, False
        self.compiled = self._compile(tower)
        self._limits = _limits()
        self._shape: dict[tuple, torch.Size] = {}
        self._told: set[torch.Size] = set()
        self.ran: set[bool] = set()

    def __call__(self, images: Tensor, tokens: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        if self.any_batch and not self._gains(images):
            return self.plain(images, tokens)
        if self.failed:
            return self._without(images, tokens)
        kind = (torch.is_grad_enabled(), images.requires_grad, tokens)
        asked = images.shape[1:] if self.any_batch else images.shape
        is_new = kind not in self._shape
        shape = self._shape.setdefault(kind, asked)
        if asked != shape:
            if asked not in self._told:
                self._told.add(asked)
                self.say(f"{self.name}: compiled for images {list(shape)}; those of {list(asked)} run uncompiled")
            return self._without(images, tokens)
        before = _graphs_made()
        try:
            if self.any_batch:
                torch._dynamo.maybe_mark_dynamic(images, 0)
            with self._limits:
                found = self._replayed(images, tokens) if self.graphs else self.compiled(images, tokens)
        except compiler_errors() as error:
            self._fail(error)
            return self._without(images, tokens)
        self.ran.add(not self.failed)  # a block may have failed, and gone on
        if not is_new and not self.again and _graphs_made() > before:
            self.again = True
            self.say(f"{self.name} was compiled again, which costs time: see why with TORCH_LOGS=recompiles")
        return found

    def _without(self, images: Tensor, tokens: bool) -> Tensor | tuple[Tensor, Tensor]:
        self.ran.add(False)
        return self.plain(images, tokens)

    def _gains(self, images: Tensor) -> bool:
        """Whether a graph for any batch is worth its while for these images."""
        on_a_cpu = images.device.type == "cpu"
        return len(images) > 1 and (torch.is_grad_enabled() or not on_a_cpu or self.tower.convolves)

    def _compile(self, tower: ImageTower) -> Callable:
        dynamic = None if self.any_batch else False  # None: what is marked, which is the number of images
        return torch.compile(self.plain, dynamic=dynamic, mode="reduce-overhead" if self.graphs else None)

    def _fail(self, error: Exception) -> None:
        self.failed = True
        self.say(f"{self.name} runs uncompiled: {compiler_words(error)}")

    def _replayed(self, images: Tensor, tokens: bool) -> Tensor | tuple[Tensor, Tensor]:
        torch.compiler.cudagraph_mark_step_begin()
        found = self.compiled(images * 1, tokens)  # the product's own backward copies the gradient
        return tuple(t.clone() for t in found) if isinstance(found, tuple) else found.clone()


class CompiledBlocks(CompiledForward):
    """A `CompiledForward` of a tower that gathers its weights between its blocks: a graph of a block, not of the tower.

    Blocks of one kind share their graph. Where compiling fails, that very block goes on without: the tower from its
    start would gather again on this rank alone, for which the other ranks would not be there.
    """

    def _compile(self, tower: ImageTower) -> Callable:
        self._at_its_shape = False
        for block in blocks(tower):
            block.forward = self._either(block.forward)
        return self._by_block

    def _by_block(self, images: Tensor, tokens: bool) -> Tensor | tuple[Tensor, Tensor]:
        self._at_its_shape = True
        try:
            return self.plain(images, tokens)
        finally:
            self._at_its_shape = False

    def _either(self, forward: Callable) -> Callable:
        compiled = torch.compile(forward, dynamic=False, mode=None)

        def run(*args, **kwargs):
            if self._at_its_shape and not self.failed:
                try:
                    return compiled(*args, **kwargs)
                except compiler_errors() as error:
                    self._fail(error)
            return forward(*args, **kwargs)

        return run


def _limits() -> AbstractContextManager:
    """While it lasts, a function may have `MOST_GRAPHS` graphs; one more is an error, where torch would stop at 8 and
    run without in silence.
    """
    if "torch._dynamo" not in sys.modules:  # torch.compile imports it: nothing is compiled
        return nullcontext()
    return torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS, fail_on_recompile_limit_hit=True)


def _graphs_made() -> int:
    """How many graphs this process has made, of whatever."""
    utils = sys.modules.get("torch._dynamo.utils")  # not there before something is compiled
    return utils.counters["stats"]["unique_graphs"] if utils else 0


def compile_blocks(tower: ImageTower, name: str, say: Say) -> None:
    """Let each block of a sharded tower be a compiled graph from the next call on; `say` where it has no blocks."""
    if blocks(tower):
        tower.graph = CompiledBlocks(tower, name, say)
    else:
        say(f"{name} is sharded as a whole, for want of blocks, and runs uncompiled")


def compile_tower(tower: ImageTower, name: str, say: Say, graphs: bool = False, any_batch: bool = False) -> None:
    """Let a tower's forward be a compiled graph from its next call on; see `CompiledForward`."""
    tower.graph = CompiledForward(tower, name, say, graphs, any_batch)


def wants_compiling(setting: str, device: torch.device) -> bool:
    """Whether `engine.compile` asks for graphs on this device.

    `auto` compiles on GPUs. On a CPU nine tenths of a ViT's time are matrix products at full rate already, and the
    first step takes a minute longer.
    """
    return setting in ("on", "graphs") or (setting == "auto" and device.type == "cuda")
