"""Start the ranks of a test as processes that meet at a file, without a TCP port.

They are forked from a process that has done the imports, which take a rank longer than most of the tests;
`test_launchers.py` and the tests on Slurm start theirs as a user does.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from multiprocessing import forkserver
from pathlib import Path

import pytest

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["deepspeed", "mmtard.training.train", "mmtard.evaluation.evaluate"])
AT_IMPORT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}  # read where torch and DeepSpeed are imported


class Rank:
    """A process, with what the tests use of `subprocess.Popen`."""

    def __init__(self, argv: list[str], env: dict[str, str], log: Path):
        self._process = FORKS.Process(target=_become, args=(argv, env, log))
        self._process.start()
        self.pid = self._process.pid
        atexit.register(self.kill)  # multiprocessing waits for what a test that failed has left

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(f"rank (process {self.pid})", timeout)
        return self.poll()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _become(argv: list[str], env: dict[str, str], log: Path) -> None:
    """Go on as `python *argv`: argv is `-m MODULE ...`, `-c CODE` or `SCRIPT ...`."""
    os.environ.clear()
    os.environ.update(env)
    with log.open("ab") as out:
        for number in (1, 2):
            os.dup2(out.fileno(), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    what, *words = argv
    if what == "-c":
        sys.argv = ["-c", *words[1:]]
        exec(compile(words[0], "<string>", "exec"), {"__name__": "__main__"})
    elif what == "-m":
        sys.argv = words
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        runpy.run_path(what, run_name="__main__")


def environment(rank: int, world: int, meet: Path) -> dict[str, str]:
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MMTARD_INIT_FILE": meet}
    return os.environ | AT_IMPORT | {k: str(v) for k, v in own.items()}


def start_ranks(argv: list, world: int, meet: Path, log: Path) -> list[Rank]:
    """`python *argv` as `world` ranks; what rank r prints goes to the end of LOG.r."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in AT_IMPORT.items():
            patch.setenv(name, value)
        forkserver.ensure_running()
    meet.unlink(missing_ok=True)
    return [
        Rank([*map(str, argv)], environment(rank, world, meet), log.with_suffix(f".{rank}")) for rank in range(world)
    ]


def run_ranks(argv: list, world: int, folder: Path, name: str, timeout: float = 300) -> str:
    """Run the ranks to their end; what rank 0 printed. Fails with the output of all when one does not exit 0."""
    log = folder / name
    processes = start_ranks(argv, world, folder / f"{name}.meet", log)
    try:
        statuses = [p.wait(timeout) for p in processes]
    finally:
        for p in processes:
            p.kill()
    printed = [log.with_suffix(f".{r}").read_text() for r in range(world)]
    assert statuses == [0] * world, f"{name}: exit {statuses}\n" + "\n".join(printed)
    return printed[0]
