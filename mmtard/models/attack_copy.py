"""The tower that an attack differentiates: the trained one's weights without gradients, in the precision they run in.

An attack step needs the gradient to the pixels alone. On the trained tower it would cast every weight to bf16 once more
where the precision is bf16, gather every weight at each pass where ZeRO-3 spreads them, and a compiled graph would
compute the weights' gradients, too. The copy does each once an update.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .image_tower import ImageTower


class Part(NamedTuple):
    """Weights of a copy, and the trained parameters that they follow."""

    weights: list[nn.Parameter]
    sources: list[nn.Parameter]

    @torch.no_grad()
    def refresh(self) -> None:
        """One copy of many tensors. The sources must lie whole on this device."""
        torch._foreach_copy_(self.weights, self.sources)


class AttackCopy:
    """A twin of a tower for input gradients, in evaluation mode, whose weights follow the trained ones.

    Weights that autocast would cast at every use are kept cast; all others share the trained ones' memory where the
    trained ones lie whole on this device. Buffers, such as batch norm's running statistics, are the trained tower's
    own. Made before the tower is handed to ZeRO, and joined to its parameters by `follow` after.
    """

    def __init__(self, trained: ImageTower):
        self.tower = frozen_twin(trained)
        names = cast_by_autocast(self.tower) if trained.autocast else set()
        self._weights = dict(self.tower.named_parameters())
        self._dtypes = {name: trained.autocast if name in names else p.dtype for name, p in self._weights.items()}
        self._sources: dict[str, nn.Parameter] = {}
        self._copied: list[str] = []  # what a refresh fills

    def follow(self, trained: ImageTower, whole: bool) -> None:
        """Take the weights of the trained tower's parameters, which ZeRO may have moved.

        whole: whether they lie whole on this device; else each gets memory of its own, with the values from before.
        """
        self._sources = dict(trained.named_parameters())
        for name, weight in self._weights.items():
            source, dtype = self._sources[name], self._dtypes[name]
            if whole and dtype == source.dtype:
                weight.data = source.detach()
                continue
            weight.data = (source if whole else weight).detach().to(dtype, copy=True)
            if source.requires_grad:
                self._copied.append(name)

    def parts(self, most: int | None) -> Iterator[Part]:
        """What has to be copied after an update, in parts of at most so many weights (or of one parameter).

        None: all at once. The same parts on every rank.
        """
        part, size = Part([], []), 0
        for name in self._copied:
            elements = self._weights[name].numel()
            if most is not None and part.weights and size + elements > most:
                yield part
                part, size = Part([], []), 0
            part.weights.append(self._weights[name])
            part.sources.append(self._sources[name])
            size += elements
        if part.weights:
            yield part

    @property
    def bytes(self) -> int:
        """Memory of its own."""
        own = [w for n, w in self._weights.items() if w.data_ptr() != self._sources[n].data_ptr()]
        return sum(w.numel() * w.element_size() for w in own)


def frozen_twin(tower: ImageTower) -> ImageTower:
    """The same tower over the same memory, in evaluation mode, whose weights ask for no gradient."""
    shared: dict[int, object] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in tower.parameters()}
    shared |= {id(b): b for b in tower.buffers()}
    return copy.deepcopy(tower, shared).eval()


def cast_by_autocast(tower: ImageTower) -> set[str]:
    """The parameters that the forward uses only as copies in the precision of autocast: those may be kept so.

    Found by running the tower on one image and looking at what becomes of each parameter, views of it included.
    """
    uses = _Uses(tower)
    images = torch.zeros(1, 3, *tower.size, device=tower.mean.device, requires_grad=True)
    with uses:
        tower(images)
    return uses.cast - uses.kept


class _Uses(TorchDispatchMode):
    """Notes which parameters are cast to the precision of autocast, and which are used as they are."""

    def __init__(self, tower: ImageTower):
        super().__init__()
        self.lower = tower.autocast
        self.names = {p.untyped_storage()._cdata: name for name, p in tower.named_parameters()}
        self.cast: set[str] = set()
        self.kept: set[str] = set()

    def __torch_dispatch__(self, function: Callable, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        results = {_storage(t) for t in tree_leaves(result) if isinstance(t, Tensor)}
        if not results:  # a question, such as for the device
            return result
        for tensor in tree_leaves((args, kwargs)):
            name = self.names.get(_storage(tensor)) if isinstance(tensor, Tensor) else None
            if name is None or _storage(tensor) in results:
                continue  # no parameter, or another view of it
            is_cast = function is torch.ops.aten._to_copy.default and result.dtype == self.lower
            (self.cast if is_cast else self.kept).add(name)
        return result


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
