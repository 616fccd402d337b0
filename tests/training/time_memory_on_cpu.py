"""Seconds of a training step on a CPU: as it is, without the memory that is kept, and without starts drawn in parts.

    OMP_NUM_THREADS=1 python -m tests.training.time_memory_on_cpu

In a checkout; no test. A small ViT on 64 random images of 224 px, TeCoA against one step from a random start, each way
in a process of its own, in turns.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from mmtard.examples import pretrain

ROUNDS, STEPS = 3, 4
WITHOUT = {
    "as it is": {},
    "freed memory goes back to the kernel": {"mmtard.distributed.ranks.keep_freed_memory": "lambda: None"},
    "random starts of the whole batch at once": {"mmtard.seeding.AT_ONCE": "2**62"},
}
WITHOUT["neither"] = {key: value for changed in WITHOUT.values() for key, value in changed.items()}
ARCHITECTURE = Path(pretrain.__file__).with_name("vit224-student.json")
SETTINGS = [
    f"student={{arch: {ARCHITECTURE}, weights: random}}", "teachers=null", "method={name: tecoa}",
    "attack={eps: 4/255, step_size: null, steps: 1}", "train.batch_size=64", "data.lanes=8",
]  # fmt: skip


def seconds(way: str, out: Path) -> float:
    """The median step of one process."""
    patches = "".join(f"mock.patch({name!r}, {value}).start();" for name, value in WITHOUT[way].items())
    words = ["bench", "train", "benchmarks/vitb32_vitl14", *SETTINGS]
    words += ["--variants", "mmtard", "--classes", "10", "--rounds", str(STEPS), "--out", str(out)]
    code = f"from unittest import mock; {patches} from mmtard.cli.main import main; raise SystemExit(main({words!r}))"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    return statistics.median(json.loads(out.read_text())["variants"]["mmtard"]["seconds"])


def main() -> None:
    """Print the median of all ways, and what each is to the first, round by round."""
    found = {way: [] for way in WITHOUT}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(ROUNDS):
            for way in list(WITHOUT)[:: -1 if number % 2 else 1]:
                found[way].append(seconds(way, Path(folder) / "bench.json"))
    for way, taken in found.items():
        times = sorted(a / b for a, b in zip(taken, found["as it is"]))
        print(f"{way}: {statistics.median(taken):.2f} s a step, {times[0]:.2f} to {times[-1]:.2f} times")


if __name__ == "__main__":
    main()
