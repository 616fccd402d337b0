"""The attacks' arithmetic as one kernel where torch runs a dozen: on for an evaluation that compiles its model.

    @fusible
    def climbed(x, images, norm, eps): ...  # tensors of R samples in and out

    with fused(say): ...  # in here `climbed` is a graph of torch.compile, made once for any R

A fused function rounds as the plain one does; only sums may be added up in another order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ..errors import compiler_errors, compiler_words

F = TypeVar("F", bound=Callable)
_say: ContextVar[Callable[[str], object] | None] = ContextVar("fused", default=None)
_graphs: dict[Callable, Callable] = {}  # by function; the function itself where compiling failed


@contextmanager
def fused(say: Callable[[str], object] | None) -> Iterator[None]:
    """Fuse the attacks' arithmetic in this context; None leaves it as it is.

    say: takes one line where compiling fails, as without a C++ compiler or Triton; then all goes on without.
    """
    token = _say.set(say)
    try:
        yield
    finally:
        _say.reset(token)


def fusible(function: F) -> F:
    """A function that becomes one kernel within `fused`. All is given by place; tensors have a row for each sample.

    A single sample is computed without: a graph for any number begins at two.
    """

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        say = _say.get()
        tensors = [argument for argument in args if isinstance(argument, Tensor)]
        if say is None or len(tensors[0]) < 2:
            return function(*args)
        if function not in _graphs:  # not before: the compiler's import takes long
            _graphs[function] = torch.compile(function, fullgraph=True)
        for tensor in tensors:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        try:
            with torch.no_grad():
                return _graphs[function](*map(_not_a_constant, args))
        except compiler_errors() as error:
            say(f"the attacks' {function.__name__} is not fused: {compiler_words(error)}")
            _graphs[function] = function
            return function(*args)

    return cast(F, run)


def _not_a_constant(argument: object) -> object:
    """A number as a tensor, so that one graph serves every radius and step; all else as it is."""
    return torch.tensor(argument, dtype=torch.float64) if isinstance(argument, float) else argument
