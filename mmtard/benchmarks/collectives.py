"""How long a step is in collectives, whichever of its phases they belong to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from .phases import PhaseClock

COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_gather_single",
    "all_reduce",
    "all_reduce_coalesced",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_tensor",
)


@contextmanager
def timed_collectives(clock: PhaseClock) -> Iterator[PhaseClock]:
    """Inside the block, let the clock time torch's collectives and the waits for those launched before.

    DeepSpeed keeps some of the functions that it finds at its start, so the block must surround that. On a GPU the
    time is that of the stream that launches or waits: what overlaps with the backward on another stream counts, too.
    """
    names = [name for name in COLLECTIVES if hasattr(dist, name)]
    own = {name: getattr(dist, name) for name in names}
    wait = dist.Work.wait
    for name, function in own.items():
        setattr(dist, name, clock.timed("communication", function))
    dist.Work.wait = clock.timed("communication", wait)
    try:
        yield clock
    finally:
        dist.Work.wait = wait
        for name, function in own.items():
            setattr(dist, name, function)
