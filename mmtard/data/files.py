"""What several processes need to share files safely: locks, publishing by rename, openers of remote files, work spread over processes."""

import fcntl
import multiprocessing
import os
import signal
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from webdataset.gopen import gopen

from ..errors import UserError
from ..lifetime import tie_to


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file `path` against every other process and thread of the node; the file is removed afterwards.

    Raises OSError where the lock file cannot be made or the file system has no locks.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            current = os.stat(path).st_ino == os.fstat(fd).st_ino
        except FileNotFoundError:
            current = False
        except OSError:
            os.close(fd)
            raise
        if current:
            break
        os.close(fd)  # the holder before us removed the file: what we locked is no longer what others will lock
    try:
        yield
    finally:
        Path(path).unlink(missing_ok=True)
        # Processes forked meanwhile share this lock and would keep it after close alone.
        fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def held(path: Path) -> bool:
    """Whether someone holds the lock file `path` now; False when a process that was killed left it."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(fd, fcntl.LOCK_UN)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)


@contextmanager
def opened(shard: str) -> Iterator[BinaryIO]:
    """The bytes of a local or remote shard as a stream. Raises OSError when it cannot be opened or its opener's program fails."""
    try:
        stream = gopen(shard, "rb")
    except ValueError:  # a scheme that webdataset has no opener for
        raise OSError("no opener for this scheme; write it as a command, like pipe:aws s3 cp s3://bucket/0.tar -") from None
    try:
        yield stream
    except OSError:
        if getattr(stream, "status", None):
            raise OSError(f"its opener ended with status {stream.status}") from None
        raise
    except (tarfile.ReadError, UserError):
        # A program we stopped reading from dies of the closed pipe; any other failure of it explains what we could not read.
        _close(stream, tolerated=(-signal.SIGPIPE,))
        raise
    else:
        _close(stream)


def _close(stream: BinaryIO, tolerated: tuple[int, ...] = ()) -> None:
    try:
        stream.close()
    except OSError as error:
        if (status := getattr(stream, "status", None)) not in tolerated:
            raise OSError(f"its opener ended with status {status}" if status else str(error)) from None


@contextmanager
def publish(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends well, so no one ever sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def spread(function: Callable, items: list, jobs: int | None, title: str, progress: bool) -> list:
    """`[function(item) for item in items]` over `jobs` processes (None: the cores this process may use).

    The first exception stops the work that has not begun and is raised here.
    """
    jobs = min(jobs or len(os.sched_getaffinity(0)), len(items))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not progress) as bar:
        if jobs <= 1:
            return [function(item) for item in bar.track(items, description=title)]
        context = multiprocessing.get_context("fork")
        # Workers of a parent that was killed would wait for ever, and hold the locks that they inherited.
        with ProcessPoolExecutor(jobs, mp_context=context, initializer=tie_to, initargs=(os.getpid(),)) as pool:
            futures = [pool.submit(function, item) for item in items]
            try:
                return [future.result() for future in bar.track(futures, description=title)]
            except BrokenProcessPool:
                raise UserError(f"{title}: a worker process was killed (out of memory?); use fewer than {jobs} jobs") from None
            finally:
                pool.shutdown(cancel_futures=True)
