"""torch.compile for tests: as it is, but that it writes no C++."""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock


@contextmanager
def graphs_without_cpp() -> Iterator[dict[str, Counter]]:
    """While it lasts, torch.compile makes graphs and leaves out the backend that would compile them for minutes.

    Gives the compiler's own counters, set to zero.
    """
    import torch._dynamo  # takes a second, for which a process that compiles nothing has no time
    from torch._dynamo.utils import counters

    from mmtard.attacks import fused

    make = torch.compile

    def aot_eager(function, mode=None, **settings):
        return make(function, backend="aot_eager", **settings)

    torch._dynamo.reset()
    counters.clear()
    with (
        mock.patch.dict(os.environ, TORCHDYNAMO_DISABLE="0"),
        torch._dynamo.config.patch(disable=False),
        mock.patch.object(torch, "compile", aot_eager),
        mock.patch.dict(fused._graphs, clear=True),  # made by others, of another backend
    ):
        yield counters


def graphs_made() -> int:
    """The graphs of all functions so far, none of which was broken off halfway."""
    from torch._dynamo.utils import counters

    assert not counters["graph_break"], dict(counters["graph_break"])
    return counters["stats"]["unique_graphs"]
