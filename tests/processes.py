"""What tests ask of processes: whether another one lives, and that this one be a rank for a while."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def alive(pid: int | str) -> bool:
    """Whether a process is there and has not ended: a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def processes_where(holds: Callable[[list[str]], bool]) -> list[int]:
    """The ids of the processes whose command line, in words, is such, whoever their parents are by now."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
        except (OSError, UnicodeDecodeError):
            continue
        if holds(words):
            found.append(int(path.parent.name))
    return found


@contextmanager
def only_rank() -> Iterator:
    """This process as the only one of its group; the environment that joining it changes is put back."""
    from mmtard.distributed import ranks as process_group  # torch, which most tests of the command line do without

    before = dict(os.environ)
    try:
        yield process_group.start("cpu")
    finally:
        process_group.stop()
        os.environ.clear()
        os.environ.update(before)
