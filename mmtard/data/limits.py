"""What loader processes need of the machine, tested before they start: without it they wait for ever without a word."""

from __future__ import annotations

import os
import resource

from ..distributed.processes import raise_descriptor_limit
from ..errors import UserError

SHARED_MEMORY = "/dev/shm"
PREFETCHED = 2  # batches that torch's DataLoader has each worker prepare ahead
FILES_OF_A_WORKER = 20  # its pipes, and the tensors of the batches on their way
FILES_BESIDE = 32  # shards, logs and sockets of the process itself
MOST_FILES = 1 << 16


def prepare_for_workers(workers: int, batch_bytes: int) -> None:
    """Raise the limit of open files as far as the system allows.

    Raises UserError where files or shared memory do not suffice for `workers` processes that hand over batches of
    `batch_bytes`.
    """
    files = raise_file_limit()
    if not workers:
        return
    open_now = len(os.listdir("/proc/self/fd"))
    need = open_now + FILES_BESIDE + FILES_OF_A_WORKER * workers
    if files < need:
        raise UserError(
            f"data.workers: this process may have {files} files open, and {workers} loader processes need about "
            f"{need}; raise the limit (`ulimit -n`), or set data.workers=0 (--workers 0)"
        )
    free, need = free_shared_memory(), loader_bytes(workers, batch_bytes)
    if free is not None and free < need:
        raise UserError(
            f"data.workers: {SHARED_MEMORY} has {free / 2**20:.3g} MiB free, and {workers} loader processes need about "
            f"{need / 2**20:.3g} MiB there; give the container more (docker run --shm-size=8g), or set data.workers=0 "
            "(--workers 0)"
        )


def loader_bytes(workers: int, batch_bytes: int) -> int:
    """Bytes of shared memory that so many loader processes of one rank take."""
    return (PREFETCHED * workers + 1) * batch_bytes if workers else 0


def free_shared_memory() -> int | None:
    """Bytes free in this node's shared memory; None where there is none of that name."""
    try:
        shared = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None
    return shared.f_bavail * shared.f_frsize


def raise_file_limit() -> int:
    """Raise this process's limit of open files to what it may be; the limit."""
    limit = raise_descriptor_limit(MOST_FILES)
    return MOST_FILES if limit == resource.RLIM_INFINITY else limit
