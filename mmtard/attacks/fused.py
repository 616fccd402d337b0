"""The attacks' arithmetic as one kernel where torch runs a dozen: on where the attacked tower is compiled, too.

    @fusible
    def climbed(x, images, norm, eps): ...  # tensors of R samples in and out

    with fused(Fusion(say)):  # in here `climbed` is a graph of torch.compile, made once for any R and eps
        ...

On a CPU a fused function rounds as the plain one does; only sums may be added up in another order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ..errors import compiler_errors, compiler_words

F = TypeVar("F", bound=Callable)


@dataclass
class Fusion:
    """What `fused` is given, once or time and again: it fuses until compiling fails, and then all goes on without.

    say: takes one line where compiling fails, as without a C++ compiler or Triton.
    """

    say: Callable[[str], object]
    failed: bool = False


_fusion: ContextVar[Fusion | None] = ContextVar("fusion", default=None)
_graphs: dict[Callable, Callable] = {}  # by function


@contextmanager
def fused(fusion: Fusion) -> Iterator[Fusion]:
    """Fuse the attacks' arithmetic in this context."""
    token = _fusion.set(fusion)
    try:
        yield fusion
    finally:
        _fusion.reset(token)


def fusible(function: F) -> F:
    """A function that becomes one kernel within `fused`.

    All is given by place; tensors, of which the first argument is one, have a row for each sample. A single sample is
    computed without: a graph for any number begins at two.
    """

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        fusion = _fusion.get()
        if fusion is None or fusion.failed or len(args[0]) < 2:
            return function(*args)
        if function not in _graphs:  # not before: the compiler's import takes long
            _graphs[function] = torch.compile(function, fullgraph=True)
        try:
            with torch.no_grad():
                return _graphs[function](*map(_for_any, args))
        except compiler_errors() as error:
            fusion.failed = True
            fusion.say(f"the attacks' arithmetic is not fused: {function.__name__}: {compiler_words(error)}")
            return function(*args)

    return cast(F, run)


def _for_any(argument: object) -> object:
    """An argument that makes no graph of its own: a tensor of any number of rows, a float that may change."""
    if isinstance(argument, Tensor):
        argument = argument.detach()  # one tensor in two places is two; the mark is not the caller's
        torch._dynamo.maybe_mark_dynamic(argument, 0)
    elif isinstance(argument, float):
        argument = torch.tensor(argument, dtype=torch.float64)
    return argument
