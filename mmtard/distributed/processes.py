"""What processes may hold, and how they end: with the one they work for, without torch's threads in the way."""

from __future__ import annotations

import atexit
import ctypes
import os
import resource
import signal
import sys
import threading
from typing import NoReturn

PR_SET_PDEATHSIG = 1  # linux/prctl.h
KEEP = ((-4, 0), (-1, -1))  # malloc.h: M_MMAP_MAX, no block is mapped alone; M_TRIM_THRESHOLD, none is returned
# The variables by which a process takes itself for a rank. Children that are no ranks start without them.
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "MMTARD_INIT_FILE")


def raise_descriptor_limit(wanted: int = 65536) -> int:
    """Let this process open as many files and sockets as its hard limit allows, up to `wanted`; the new limit.

    gloo alone takes a socket for every other rank and group, and the usual limit is 1024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        return allowed
    return soft


def keep_freed_memory() -> bool:
    """Let malloc keep what is freed, for the next tensor of its size; whether this C library can be told so.

    glibc gives blocks of over 32 MiB back to the kernel at once, which clears every page of the next one. On a CPU, a
    batch of images of 224 px is such a block in a dozen places of a step. What was freed before this call goes back:
    of several runs in one process, none adds to what another kept.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    libc.malloc_trim(0)
    return all([libc.mallopt(what, value) for what, value in KEEP])


def die_with_parent(parent: int, number: int = signal.SIGKILL) -> None:
    """Have the kernel send this process the signal `number` when the thread that started it ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, number, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it ended before the kernel knew
        sys.exit("the parent process is gone")


def exit_process(status: int) -> NoReturn:
    """End this process with a status as the interpreter would, without taking the interpreter down.

    Output that could not be written, as on a full disk, makes 120 of a status of 0; a reader that left does not.

    A thread of gloo or of autograd may hold a tensor for a moment after the last collective or backward. If it
    releases the tensor while the interpreter is taken down, the whole process aborts, and a finished run looks like a
    failed one (pytorch issue 190489).
    """
    threading._shutdown()  # as multiprocessing ends its processes
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # a closed pipe, a full disk
            status = status or 120
    if (failure := getattr(sys.stdout, "failure", None)) is not None:
        print(f"standard output could not be written whole: {failure.strerror or failure}", file=sys.stderr, flush=True)
        status = status or 120
    os._exit(status)
