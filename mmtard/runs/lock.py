"""One start at a time works in a run's folder, also where the file system has no locks."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import IO

from ..errors import UserError
from .layout import HEARTBEATS, LOCK, OWNER

QUIET_S = 2.0  # the start before this one may be at its end
LOCK_WAIT_S = 60.0  # a start that was killed on another node may leave the file system a while to notice


class Owner:
    """The file that stands for a lock where the file system has none; it goes with this object, or with the process."""

    def __init__(self, path: Path, text: str):
        self.release = weakref.finalize(self, _remove_own, path, text)


def take(run: Path) -> list[IO | Owner]:
    """Take the run's lock; it is held as long as the result is kept. Raises UserError when another start has it."""
    try:
        # A link that someone left in its place is not followed.
        fd = os.open(run / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(
            f"run_dir: '{run / LOCK}' cannot be opened: {error.strerror}; remove it, or choose another folder"
        ) from None
    file = os.fdopen(fd, "r+", errors="replace")
    waiting = _Waiting(run)
    while not (locked := _try_lock(file)):
        if locked is None:
            file.close()
            return [_take_owner_file(run, waiting)]
        if waiting.is_over():
            raise _in_use(run, _owner(file))
        waiting.go_on(_owner(file))
    with suppress(OSError):  # who holds it is for the eye; a full disk is told by what must be written
        os.ftruncate(fd, 0)
        os.write(fd, f"{socket.gethostname()} process {os.getpid()}".encode())
    return [file]


def is_taken(run: Path) -> bool:
    """Whether a start holds the run's lock, on whatever node. Takes nothing."""
    try:
        with (run / LOCK).open("rb") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError:
        return (run / OWNER).exists()
    return False


def _try_lock(file: IO) -> bool | None:
    """Whether the lock is ours now; None where the file system knows no locks."""
    try:
        # A lock by fcntl belongs to the process alone: loader workers that outlive it for a moment do not hold it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True


class _Waiting:
    """The wait for a start that has the run's folder; it is told when it takes longer than a moment."""

    def __init__(self, run: Path):
        self.run, self.began, self.said = run, time.monotonic(), False
        self.until = self.began + LOCK_WAIT_S

    def is_over(self) -> bool:
        return time.monotonic() > self.until

    def go_on(self, owner: str) -> None:
        """Wait a moment more; say for whom, once."""
        if not self.said and time.monotonic() > self.began + QUIET_S:
            self.said = True
            print(
                f"mmtard: run_dir: '{self.run}' is in use by {owner}; waiting up to {LOCK_WAIT_S:.0f} s for its end",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(0.5)


def _take_owner_file(run: Path, waiting: _Waiting) -> Owner:
    path, seen = run / OWNER, None
    own = f"{json.dumps({'host': socket.gethostname(), 'pid': os.getpid(), 'since': time.time_ns()})}\n"
    while True:
        try:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "w") as file:
                file.write(own)
            return Owner(path, own)
        except FileExistsError:
            text = _read(path)
        host, pid = _host_and_pid(text)
        beat = _read(run / HEARTBEATS / "rank-0.json")
        if host == socket.gethostname() and pid is not None and not _is_alive(pid):
            _remove_own(path, text)
        elif seen is not None and beat != seen:
            raise _in_use(run, f"{host} process {pid}")
        elif waiting.is_over():
            if host == socket.gethostname():
                raise _in_use(run, f"{host} process {pid}")
            _remove_own(path, text)  # of another node, and without a heartbeat for all of the wait
        else:
            seen = beat
            waiting.go_on(f"{host} process {pid}" if pid is not None else host)


def _owner(file: IO) -> str:
    """Who says in the lock's file that it holds it."""
    file.seek(0)
    return file.read().strip() or "another process"


def _in_use(run: Path, owner: str) -> UserError:
    return UserError(f"run_dir: '{run}' is in use by {owner}; wait for it to end, end it, or choose another folder")


def _host_and_pid(text: str) -> tuple[str, int | None]:
    try:
        owner = json.loads(text)
        return str(owner["host"]), int(owner["pid"])
    except (ValueError, KeyError, TypeError):
        return "another node", None  # being written, or damaged


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _remove_own(path: Path, text: str) -> None:
    """Remove the owner's file if it still says `text`: nobody else has taken the folder since."""
    if _read(path) == text:
        path.unlink(missing_ok=True)
