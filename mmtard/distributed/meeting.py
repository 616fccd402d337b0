"""Where the ranks of a launch meet: each says that it is there, and hears who is missing."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future
from contextlib import suppress
from datetime import timedelta
from threading import Thread

import torch.distributed as dist
from torch.distributed import PrefixStore

from ..errors import RunError

QUIET_S = 5.0  # how long a rank waits for the others without a word
NAMED = 8  # missing ranks that a message lists
# What only a launcher sets that ends the other ranks when one of them ends.
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "SLURM_STEP_ID", "SLURM_STEPID")


def patience_of(watchdog_minutes: float) -> timedelta:
    """How long a rank waits for others that have not come: a fifth of the watchdog's time, 2 minutes of its 10.

    The whole of it under srun and torchrun. They start ranks one after another where a cluster is slow, and end all of
    them when one of them ends.
    """
    launched = any(os.environ.get(name) for name in LAUNCHERS)
    return timedelta(minutes=watchdog_minutes if launched else watchdog_minutes / 5)


def meet(place: str, rank: int, world: int, patience: timedelta) -> dist.Store:
    """The store that all ranks share, once every one of them has come to it.

    place: `env://` (MASTER_ADDR and MASTER_PORT) or `file://PATH`. A wait of more than a few seconds is told, with the
    ranks that are missing. Raises RunError where some have not come in time, or the store cannot be reached.
    """
    wait = _Wait(rank, world, _in_words(place), patience)
    try:
        store = _store(place, rank, world, patience, wait)
    except (dist.DistError, RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        if "EADDRINUSE" in reason:
            reason = "another program has this port; set MASTER_PORT to a free one, the same on every rank"
        raise RunError(f"rank {rank} of {world} did not meet the others at {wait.where}: {reason}") from None
    here = PrefixStore("mmtard/met", store)
    here.set(str(rank), "here")
    try:
        while not _all_met(here, rank, world):
            wait.longer(lambda: _missing(here, world))
    except RunError:
        with suppress(RuntimeError):
            here.delete_key(str(rank))  # a file would keep it for a later start
        raise
    return store


class _Wait:
    """A wait for other ranks: told once, and not for ever."""

    def __init__(self, rank: int, world: int, where: str, patience: timedelta):
        self.who, self.where, self.seconds = f"rank {rank} of {world}", where, patience.total_seconds()
        self.began, self.told = time.monotonic(), False

    def longer(self, missing: Callable[[], list[int]]) -> None:
        """Wait a moment longer for the ranks that are `missing()`. Raises RunError where that was too long."""
        waited = time.monotonic() - self.began
        if waited > self.seconds:
            raise RunError(
                f"{self.who} waited {self.seconds:.0f} seconds at {self.where} for {_named(missing())}; "
                "start all ranks again (resume.watchdog_minutes lengthens the wait)"
            )
        if waited > QUIET_S and not self.told:
            self.told = True
            print(f"mmtard: {self.who} waits at {self.where} for {_named(missing())}", file=sys.stderr, flush=True)
        time.sleep(0.05)


def _store(place: str, rank: int, world: int, patience: timedelta, wait: _Wait) -> dist.Store:
    if place.startswith("file://"):
        return dist.FileStore(place.removeprefix("file://"), world)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True):  # torchrun's own
        return next(iter(dist.rendezvous(place, rank, world, timeout=patience)))[0]
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    while rank and not _answers(address, port):  # torch's own wait for it lets nothing be told
        wait.longer(lambda: [0])
    settings = {"timeout": patience, "wait_for_workers": False, "multi_tenant": True}
    return _in_time(lambda: dist.TCPStore(address, port, world, rank == 0, **settings), wait)


def _in_time(make: Callable[[], dist.Store], wait: _Wait) -> dist.Store:
    """The store that `make` makes, which waits for ever where what answers at its address is no first rank."""
    made: Future[dist.Store] = Future()

    def run() -> None:
        try:
            made.set_result(make())
        except Exception as error:
            made.set_exception(error)

    Thread(target=run, name="meet", daemon=True).start()
    while not futures.wait([made], timeout=0.05).done:
        wait.longer(lambda: [0])
    return made.result()


def _answers(address: str, port: int) -> bool:
    """Whether the first rank is there, which keeps the store of an address."""
    with suppress(OSError):
        socket.create_connection((address, port), timeout=2).close()
        return True
    return False


def _all_met(here: dist.Store, rank: int, world: int) -> bool:
    """Whether every rank has come. The first one looks for each, and the others for its word alone."""
    with suppress(RuntimeError):  # the first rank, which keeps the store, is gone
        if rank == 0 and here.check([str(one) for one in range(world)]):
            here.set("all", "here")
        return here.check(["all"])
    return False


def _missing(here: dist.Store, world: int) -> list[int]:
    """The ranks that have not come yet; the first one where it has told nobody that all have."""
    with suppress(RuntimeError):
        return [rank for rank in range(world) if not here.check([str(rank)])] or [0]
    return [0]


def _named(ranks: list[int]) -> str:
    more = f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:NAMED]))}{more}"


def _in_words(place: str) -> str:
    return place if place != "env://" else f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
