"""The collectives of torch.distributed, each of them wrapped, so that a benchmark can time them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

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
def wrapped_collectives(wrap: Callable[[Callable], Callable]) -> Iterator[None]:
    """Inside the block, have `wrap` of each collective, and of the wait for those launched before, in its place.

    DeepSpeed keeps some of the functions that it finds at its start, so the block must surround that. Where `wrap`
    times a GPU, it finds the stream that launches or waits: what overlaps with the backward on another counts, too.
    """
    places = [(dist, name) for name in COLLECTIVES if hasattr(dist, name)] + [(dist.Work, "wait")]
    own = [getattr(place, name) for place, name in places]
    for (place, name), function in zip(places, own):
        setattr(place, name, wrap(function))
    try:
        yield
    finally:
        for (place, name), function in zip(places, own):
            setattr(place, name, function)
