"""mmtard as a guest in another program: what it changes of a process is put back when it is done. No torch."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from .interruption import Interruption

# Joining a process group sets the first three, keeping DeepSpeed off a GPU the last.
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DS_ACCELERATOR")


@contextmanager
def environment_as_it_was() -> Iterator[None]:
    """Puts the variables that mmtard sets back: a later child process is no rank, and chooses its own accelerator."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in VARIABLES:
            if name in before:
                os.environ[name] = before[name]
            else:
                os.environ.pop(name, None)


@contextmanager
def signals_as_they_were() -> Iterator[None]:
    """A run of the command line ignores signals once it is done; a program or notebook that goes on must not."""
    before = {number: signal.getsignal(number) for number in Interruption.SIGNALS}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)
