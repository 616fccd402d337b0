"""Where an attack is with a batch, so that another process can go on with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, Protocol

from torch import Tensor


class Resumable(Protocol):
    """The state of an attack on the samples of `seeds`, which can be taken to another process."""

    seeds: Tensor
    memory: AttackMemory

    def snapshot(self) -> dict[str, Tensor]:
        """All that another process needs to go on."""

    def restore(self, kept: dict[str, Tensor]) -> None:
        """Go on where the state was when `kept` was taken."""


class AttackMemory:
    """Holds on to the state of one attack on one batch; `snapshot` is all that it needs to go on, at any moment.

    kept: the snapshot of an earlier process, of which the attack goes on where it is of the same samples. at_step: is
    called between any two iterations.
    """

    def __init__(self, kept: dict[str, Tensor] | None = None, at_step: Callable[[], object] = lambda: None):
        self.at_step = at_step
        self._kept = kept
        self._state: Resumable | None = None

    def attach(self, state: Resumable) -> None:
        """Remember this state; put it where the kept snapshot was, if that is of the same samples."""
        kept, self._kept, self._state = self._kept, None, state
        state.memory = self
        if kept is not None and kept["seeds"].tolist() == state.seeds.tolist():
            state.restore(kept)

    def snapshot(self) -> dict[str, Tensor]:
        """The tensors of the state and of the start under way; {} before the attack has begun."""
        return {} if self._state is None else self._state.snapshot()


def with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, each name with `prefix` before it."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def of_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def tensors_of(walk: Any) -> dict[str, Tensor]:
    """The tensors of a walk, by name."""
    return {field.name: getattr(walk, field.name) for field in fields(walk)}
