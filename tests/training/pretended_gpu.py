"""A GPU that is only pretended: tensors of the CPU that say they lie on cuda:0, and are held to its rules.

    with pretended_gpu() as gpu:
        x = torch.rand(4, 3).to(gpu.device)    # says x.device == cuda:0
        x + torch.rand(4, 3)                   # raises DevicesMixed
        bool(x.sum() > 0)                      # runs, and is written down in gpu.waits

Where a tensor lies belongs to its storage, so views, detached copies and parameters follow by themselves. Every
operation is looked at where torch dispatches it, those of a backward too. What Python asks of a tensor without an
operation (its `device`, `tolist`) and what makes tensors out of nothing (`torch.zeros(..., device=...)`) is replaced
for as long. An operation's own scratch tensors, made inside torch, lie wherever they are used.

Not seen: what a kernel of CUDA does inside, DeepSpeed, FSDP2. A tensor of no dimension may come from the CPU, as with
CUDA; an index from the CPU is copied there, which waits.
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mmtard

PACKAGE = f"{Path(mmtard.__file__).parent}/"  # not any folder of that name, such as a clone's
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
NOWHERE = "nowhere yet"  # a scratch tensor that an operation of torch made for itself
PLAIN = torch._C.TensorBase
AUTOCAST = torch.autocast
FACTORIES = (
    *("empty", "zeros", "ones", "full", "arange", "linspace", "eye", "rand", "randn", "randint", "randperm"),
    *("tensor", "as_tensor", "from_numpy", "empty_like", "zeros_like", "ones_like", "full_like", "rand_like"),
    *("randn_like", "randint_like"),
)
ALLOCATIONS = ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor")
READ_BY_THE_HOST = ("_local_scalar_dense", "equal", "is_nonzero")
SHAPE_FROM_VALUES = (
    *("nonzero", "masked_select", "_unique2", "_unique", "unique_dim", "unique_consecutive", "bincount"),
    *("repeat_interleave", "argwhere"),
)
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
BETWEEN_DEVICES = ("copy_", "set_")


class DevicesMixed(RuntimeError):
    """An operation was given tensors of both devices."""


class PretendedGpu:
    """Which storages lie on the pretended GPU, and what the host waited for."""

    device = CUDA

    def __init__(self):
        self.waits: Counter[str] = Counter()
        self._places: dict[int, torch.device | str] = {}
        self._kept: list[torch.UntypedStorage] = []  # so that no address is given to another storage

    def where(self, tensor: Tensor) -> torch.device | str:
        if PLAIN.device.__get__(tensor).type == "meta":
            return PLAIN.device.__get__(tensor)
        return self._places.get(tensor.untyped_storage()._cdata, CPU)

    def put(self, tensor: Tensor, place: torch.device | str) -> Tensor:
        storage = tensor.untyped_storage()
        self._places[storage._cdata] = place
        self._kept.append(storage)
        return tensor

    def wait(self, reason: str) -> None:
        self.waits[f"{reason} at {place_in_mmtard()}"] += 1


def place_in_mmtard() -> str:
    """The innermost line of mmtard that is being run, as file:line."""
    own = [frame for frame in traceback.extract_stack() if frame.filename.startswith(PACKAGE)]
    return f"{own[-1].filename.removeprefix(PACKAGE)}:{own[-1].lineno}" if own else "(outside of mmtard)"


class _Rules(TorchDispatchMode):
    """What CUDA refuses, and where it makes the host wait; outputs lie where the inputs do."""

    def __init__(self, gpu: PretendedGpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operation.__name__.partition(".")[0]
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        places = [self.gpu.where(tensor) for tensor in given]
        on_gpu = CUDA in places
        if on_gpu:
            self._look(name, args, kwargs, given, places)
        out = operation(*args, **kwargs)
        place = CUDA if on_gpu else NOWHERE if all(p == NOWHERE for p in places) else None
        if place is not None and name not in BETWEEN_DEVICES:
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor) and self.gpu.where(tensor) in (CPU, NOWHERE):
                    self.gpu.put(tensor, place)
        return out

    def _look(self, name: str, args: tuple, kwargs: dict, given: list[Tensor], places: list) -> None:
        from_cpu = [t for t, place in zip(given, places) if place == CPU and t.dim() > 0]
        if name in INDEXING:
            self._look_at_indices(name, args)
            from_cpu = [t for t in from_cpu if not any(t is index for index in args[1])]
        if name == "copy_" and len(set(places)) > 1:
            if not (args[2] if len(args) > 2 else kwargs.get("non_blocking")):
                self.gpu.wait("a copy between devices")
        elif from_cpu:
            shapes = [f"{tuple(t.shape)} on {place}" for t, place in zip(given, places)]
            raise DevicesMixed(f"{name} of {', '.join(shapes)} at {place_in_mmtard()}")
        if name in READ_BY_THE_HOST or (name in SHAPE_FROM_VALUES and kwargs.get("output_size") is None):
            self.gpu.wait(name)

    def _look_at_indices(self, name: str, args: tuple) -> None:
        for index in args[1]:
            if index is None:
                continue
            if index.dtype == torch.bool:
                self.gpu.wait(f"{name} by a mask, whose shape depends on its values")
            elif self.gpu.where(index) == CPU and index.dim() > 0:
                self.gpu.wait(f"{name} by indices of the CPU")


class _Methods:
    """What stands on torch.Tensor meanwhile: where a tensor lies, and how it gets elsewhere."""

    def __init__(self, gpu: PretendedGpu):
        self.gpu = gpu

    def replaced(self) -> dict[str, object]:
        gpu = self.gpu
        reads = {name: self._reads(name) for name in ("tolist", "numpy", "__array__")}
        allocations = {name: self._allocates(name) for name in ALLOCATIONS}
        return {
            "device": property(lambda t: CUDA if gpu.where(t) == CUDA else PLAIN.device.__get__(t)),
            "is_cuda": property(lambda t: gpu.where(t) == CUDA),
            "is_cpu": property(lambda t: gpu.where(t) != CUDA and PLAIN.is_cpu.__get__(t)),
            "get_device": lambda t: 0 if gpu.where(t) == CUDA else -1,
            "to": lambda t, *args, **kwargs: self.to(t, *args, **kwargs),
            "cpu": lambda t, *args, **kwargs: self.to(t, CPU),
            "cuda": lambda t, *args, **kwargs: self.to(t, CUDA),
            **reads,
            **allocations,
        }

    def _reads(self, name: str) -> Callable:
        plain = getattr(torch.Tensor, name)

        def read(tensor: Tensor, *args, **kwargs):
            if self.gpu.where(tensor) == CUDA:
                if name != "tolist":
                    raise TypeError("can't convert cuda:0 device type tensor to numpy")
                self.gpu.wait(name)
            return plain(tensor, *args, **kwargs)

        return read

    def _allocates(self, name: str) -> Callable:
        plain = getattr(PLAIN, name)

        def allocate(tensor: Tensor, *args, device=None, **kwargs):
            place = self.gpu.where(tensor) if device is None else _place(device)
            if name == "new_tensor" and place == CUDA:
                self.gpu.wait("new_tensor")
            return self.gpu.put(plain(tensor, *args, **kwargs), place)

        return allocate

    def to(self, tensor: Tensor, *args, **kwargs) -> Tensor:
        here, target, dtype, flags = self.gpu.where(tensor), None, kwargs.pop("dtype", None), []
        for given in (*args, kwargs.pop("device", None), kwargs.pop("other", None)):
            if isinstance(given, (str, torch.device, int)) and not isinstance(given, bool):
                target = _place(given)
            elif isinstance(given, Tensor):
                target, dtype = self.gpu.where(given), given.dtype
            elif isinstance(given, torch.dtype):
                dtype = given
            elif isinstance(given, bool):
                flags.append(given)
        non_blocking = kwargs.pop("non_blocking", bool(flags and flags[0]))
        if getattr(target, "type", None) == "meta" or getattr(here, "type", None) == "meta":
            return PLAIN.to(tensor, *args, **({"device": target} if target else {}))
        crosses = target in (CPU, CUDA) and here in (CPU, CUDA) and target != here
        if crosses and not non_blocking:
            self.gpu.wait(f"a blocking copy to {target.type}")
        out = PLAIN.to(tensor, dtype=dtype or tensor.dtype, **kwargs)
        if not crosses:
            return out
        out = out.clone() if out.untyped_storage()._cdata == tensor.untyped_storage()._cdata else out
        return self.gpu.put(out, target)


def _place(device: str | int | torch.device) -> torch.device:
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return CUDA if device.type == "cuda" else device


def _factory(gpu: PretendedGpu, plain: Callable, name: str) -> Callable:
    def make(*args, device=None, **kwargs):
        if device is not None and torch.device(device).type == "meta":
            return plain(*args, device=device, **kwargs)
        made = plain(*args, **kwargs)
        place = CPU if device is None else _place(device)
        if device is None and args and isinstance(args[0], Tensor):  # the `_like`s
            place = gpu.where(args[0])
        if getattr(gpu.where(made), "type", None) == "meta":  # under `with torch.device("meta")`
            return made
        if place == CUDA and name in ("tensor", "as_tensor"):
            gpu.wait(f"torch.{name}(..., device=cuda)")
        return gpu.put(made, place)

    return make


class _Autocast(AUTOCAST):
    """Autocast to the GPU's precision is that of the CPU, where the tensors really are."""

    def __init__(self, device_type: str, *args, **kwargs):
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


@contextlib.contextmanager
def pretended_gpu() -> Iterator[PretendedGpu]:
    """Pretend that this machine has a GPU; tensors that were there before lie on the CPU."""
    gpu = PretendedGpu()
    with contextlib.ExitStack() as stack:
        for name, new in _Methods(gpu).replaced().items():
            stack.enter_context(mock.patch.object(torch.Tensor, name, new))
        for name in FACTORIES:
            plain = getattr(torch, name)
            stack.enter_context(mock.patch.object(torch, name, _factory(gpu, plain, name)))
        for name in ("autocast", "amp.autocast"):
            owner, _, last = f"torch.{name}".rpartition(".")
            stack.enter_context(mock.patch(f"{owner}.{last}", _Autocast))
        # It has one stream, and its random state is that of the CPU.
        for name in ("Stream", "current_stream"):
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda device=None: mock.MagicMock()))
        stack.enter_context(mock.patch.object(torch.cuda, "stream", lambda stream: contextlib.nullcontext()))
        stack.enter_context(mock.patch.object(torch.Tensor, "record_stream", lambda tensor, stream: None))
        stack.enter_context(mock.patch("torch.cuda.get_rng_state", lambda device=None: None))
        stack.enter_context(mock.patch("torch.cuda.set_rng_state", lambda state, device=None: None))
        stack.enter_context(_Rules(gpu))
        yield gpu
