"""What tests ask of processes: whether another one lives, what it imports, that this one be a rank for a while."""

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


def python_path(*folders: Path | str) -> str:
    """PYTHONPATH with these folders before those that the tests were started with."""
    return os.pathsep.join(filter(None, [*map(str, folders), os.environ.get("PYTHONPATH")]))


def without_extras(folder: Path) -> Path:
    """A folder for PYTHONPATH, in this one, with which a Python has neither transformers nor wandb: as open_clip and
    timm see it.

    To import each takes a second of every process; models and tokenizers of Hugging Face and that tracker ask for them.
    """
    for name in ("transformers", "wandb"):
        package = folder / "without" / name
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(f"raise ImportError('{name} is left out')\n")
    return folder / "without"


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
