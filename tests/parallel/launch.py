"""Start the ranks of a test as processes that meet at a file, without a TCP port."""

import os
import subprocess
import sys
from pathlib import Path


def environment(rank: int, world: int, meet: Path) -> dict[str, str]:
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MMTARD_INIT_FILE": meet, "OMP_NUM_THREADS": 1, "DS_ACCELERATOR": "cpu"}
    return os.environ | {k: str(v) for k, v in own.items()}


def start_ranks(argv: list, world: int, meet: Path, log: Path) -> list[subprocess.Popen]:
    """`python *argv` as `world` ranks; what rank r prints goes to the end of LOG.r."""
    meet.unlink(missing_ok=True)
    processes = []
    for rank in range(world):
        with log.with_suffix(f".{rank}").open("ab") as out:
            command = [sys.executable, *map(str, argv)]
            processes.append(subprocess.Popen(command, env=environment(rank, world, meet), stdout=out, stderr=subprocess.STDOUT))
    return processes


def run_ranks(argv: list, world: int, folder: Path, name: str, timeout: float = 300) -> str:
    """Run the ranks to their end and return what rank 0 printed; fails with the output of all when one does not exit 0."""
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
