"""Lock files: one process of a node at a time, and whether another one works there."""

from __future__ import annotations

import errno
import fcntl
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# What a file system without locks answers, such as Lustre mounted without flock.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
QUIET_S = 5.0  # how long a process waits for another one without a word


@contextmanager
def exclusive(path: Path, patience: float = math.inf) -> Iterator[None]:
    """Hold the lock file `path` against every other process and thread of the node; the file is removed afterwards.

    A wait that takes longer than a few seconds is told; one of so many seconds as `patience` says ends without a word
    in BlockingIOError. On a file system without locks it guards nothing: what is
    written under it is published by rename, so that two writers cost work and no more. Raises OSError where the lock
    file cannot be made or is a link.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            _lock(fd, path, patience)
            current = os.stat(path).st_ino == os.fstat(fd).st_ino
        except FileNotFoundError:
            current = False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(fd)
                raise
            current = True
        if current:
            break
        os.close(fd)  # The last holder deleted the lock file, so we locked a file nobody else can open. Try again.
    try:
        yield
    finally:
        Path(path).unlink(missing_ok=True)
        # Processes forked meanwhile share this lock and would keep it after close alone.
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


@contextmanager
def shared(path: Path) -> Iterator[None]:
    """Hold the file `path` together with others who share it: `exclusive` waits for all of them. The file stays.

    Waits for whoever holds it alone. Raises OSError where the file cannot be opened, and FileNotFoundError where it was
    removed meanwhile. On a file system without locks it guards nothing.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        if os.stat(path).st_ino != os.fstat(fd).st_ino:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        yield
    finally:
        # Processes forked meanwhile share this lock and would keep it after close alone.
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def _lock(fd: int, path: Path, patience: float) -> None:
    """Wait for the lock of an open file, and say so once where it takes long."""
    began = time.monotonic()
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waited = time.monotonic() - began
            if waited > patience:
                raise
            if waited > QUIET_S and patience == math.inf:
                break
            time.sleep(0.02)
    print(f"mmtard: another process works at '{path}'; waiting for its end", file=sys.stderr, flush=True)
    fcntl.flock(fd, fcntl.LOCK_EX)


def held(path: Path) -> bool:
    """Whether someone holds the lock file `path` now; False when a process that was killed left it.

    False as well on a file system without locks, where `exclusive` guards nothing.
    """
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
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    finally:
        os.close(fd)
