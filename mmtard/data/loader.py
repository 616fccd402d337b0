"""The processes that read and decode batches: they heed no signal of the job, and one that is lost is told as such."""

import atexit
import functools
import multiprocessing
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.data import DataLoader

from ..distributed.processes import die_with_parent
from ..errors import ProcessLostError, UserError
from .limits import prepare_for_workers
from .samples import Batch, SampleReader
from .stager import SHIELDED

STARTS = 3  # of the processes
BEGUN_WITHIN_S = 60.0  # which takes them milliseconds


def load_batches(samples: SampleReader, requests: Iterator, workers: int, batch_size: int) -> Iterator[Batch]:
    """The batch of each request, in order, read by `workers` processes (0: by this one) that heed no signal of a job.

    batch_size: samples of the largest batch. Raises UserError as the reader does, ProcessLostError for a process that
    was killed.
    """
    height, width = samples.transform.shape
    prepare_for_workers(workers, batch_bytes=batch_size * 3 * height * width)
    batches, processes = _started(samples, requests, workers) if workers else (iter(_loader(samples, requests, 0)), [])
    end = functools.partial(_end, batches, processes)
    # Before multiprocessing's own exit, which would wait for workers that ignore its SIGTERM.
    atexit.register(end)
    try:
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    except (RuntimeError, OSError, EOFError) as error:
        # A worker killed while it hands a batch over ends in an error of the connection to it.
        gone = None if "DataLoader worker" in str(error) else _killed(processes)
        if gone is None and "DataLoader worker" not in str(error):
            raise
        error = error if gone is None else RuntimeError(f"DataLoader worker (pid {gone}) was killed")
        raise _lost(error, workers) from None
    finally:
        end()
        atexit.unregister(end)


def _started(samples: SampleReader, requests: Iterator, workers: int) -> tuple[Iterator, list]:
    """(the batches, the processes that read them), all of which have begun.

    A process that is forked just when another thread takes up Python or leaves it waits without end for a lock of that
    thread's (CPython before 3.12): it is killed, and all are forked again.
    """
    kept = _Kept(requests)
    for _ in range(STARTS):
        batches, processes, told = _forked(samples, kept, workers)
        try:
            have_begun = _have_begun(told, workers)
        except BaseException:
            _end(batches, processes)
            raise
        finally:
            os.close(told)
        if have_begun:
            kept.forget()
            return batches, processes
        _end(batches, processes)
    raise ProcessLostError(
        f"a loader process did not begin within {BEGUN_WITHIN_S:.0f} s, {STARTS} times; "
        f"lower data.workers (now {workers})"
    )


def _forked(samples: SampleReader, requests: "_Kept", workers: int) -> tuple[Iterator, list, int]:
    """(the batches, the processes, the descriptor that each of them writes to when it begins)."""
    told, write = os.pipe()
    others = set(multiprocessing.active_children())
    try:
        with _signals_held():
            batches = iter(_loader(samples, requests, workers, functools.partial(_start_worker, write)))
    except BaseException:
        os.close(told)
        raise
    finally:
        os.close(write)
    _raise_lost_wherever_told(workers)
    return batches, [p for p in multiprocessing.active_children() if p not in others], told


def _have_begun(told: int, workers: int) -> bool:
    """Whether each of the processes says that it has begun, or is lost, which its batches tell."""
    until, begun = time.monotonic() + BEGUN_WITHIN_S, 0
    waiting = select.poll()
    waiting.register(told, select.POLLIN)
    while begun < workers:
        if not waiting.poll(1000 * max(0.0, until - time.monotonic())):
            return False
        words = os.read(told, workers)
        if not words:
            return True
        begun += len(words)
    return True


def _end(batches: Iterator, processes: list) -> None:
    if hasattr(batches, "_shutdown_workers"):
        batches._shutdown_workers()  # public only as garbage collection, which a kept traceback would put off
    for process in processes:
        if process.is_alive():  # in the middle of a long fetch, it ignores the signal that ends it
            process.kill()


class _Kept:
    """Requests that are asked for again from the first one on, until they are forgotten."""

    def __init__(self, requests: Iterator):
        self._requests, self._asked = requests, []
        self._keeps = True

    def __iter__(self) -> Iterator:
        yield from tuple(self._asked)
        for request in self._requests:
            if self._keeps:
                self._asked.append(request)
            yield request

    def forget(self) -> None:
        self._keeps = False
        self._asked.clear()


def _loader(samples: SampleReader, requests, workers: int, start=None) -> DataLoader:
    return DataLoader(
        samples,
        sampler=requests,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_initialized(),  # by a run on GPUs; one on the CPU leaves them alone
        worker_init_fn=start,
        multiprocessing_context="fork" if workers else None,
        generator=torch.Generator(),
    )


def _killed(processes: list) -> int | None:
    """The pid of a worker that has ended, given a moment to be known as dead; None where all live."""
    until = time.monotonic() + 1
    while True:
        dead = [p.pid for p in processes if not p.is_alive()]
        if dead or time.monotonic() > until or not processes:
            return dead[0] if dead else None
        time.sleep(0.02)


def _lost(error: RuntimeError, workers: int) -> ProcessLostError:
    return ProcessLostError(
        f"a loader process was lost: {' '.join(str(error).split())}; "
        f"if its memory ran out, lower data.workers (now {workers})"
    )


def _raise_lost_wherever_told(workers: int) -> None:
    """Make torch's handler of SIGCHLD raise ProcessLostError in place of RuntimeError.

    The handler runs when a worker dies, wherever the main thread then is: often inside a model's forward, where nobody
    could tell its RuntimeError from a fault of the model, and a run that may go on would end for good.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    torchs = signal.getsignal(signal.SIGCHLD)
    torchs = getattr(torchs, "wrapped", torchs)
    if not callable(torchs):
        return

    def handler(number, frame):
        try:
            torchs(number, frame)
        except RuntimeError as error:
            raise _lost(error, workers) from None

    handler.wrapped = torchs
    signal.signal(signal.SIGCHLD, handler)


def _as_it_is(batch):
    return batch


def _start_worker(begun: int, _: int) -> None:
    die_with_parent(multiprocessing.parent_process().pid)  # torch's own look comes late, or never in a full pipe
    for number in SHIELDED:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    os.write(begun, b".")
    os.close(begun)


@contextmanager
def _signals_held():
    """Keep the shielded signals pending while workers are forked: until they ignore them, one would end them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SHIELDED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
