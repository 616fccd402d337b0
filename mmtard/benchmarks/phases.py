"""How long each phase of a step takes: marks on the host's clock, or events on a GPU that nothing waits for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class PhaseClock:
    """Adds up the seconds of named phases. A phase inside another counts to the outer one.

    On a GPU the seconds are the device's, between two events of its stream; they are read when `seconds` asks.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._marks: list[tuple[str, object, object]] = []
        self._inside = False

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the block as part of the phase `name`."""
        if self._inside:
            yield
            return
        self._inside, began = True, self._mark()
        try:
            yield
        finally:
            self._inside = False
            self._marks.append((name, began, self._mark()))

    def timed(self, name: str, function: Callable) -> Callable:
        """`function`, each call of which is part of the phase."""

        def call(*args, **kwargs):
            with self(name):
                return function(*args, **kwargs)

        return call

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase since the last call, in the order in which they first came."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found: dict[str, float] = {}
        for name, began, ended in self._marks:
            taken = began.elapsed_time(ended) / 1e3 if self.device.type == "cuda" else ended - began
            found[name] = found.get(name, 0.0) + taken
        self._marks.clear()
        return found

    def _mark(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event
