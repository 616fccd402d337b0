"""`mmtard bench checkpoint`: how long the loop stands still for a checkpoint, and what goes on behind its back."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..config import Config
from ..distributed.ranks import Ranks, process_group
from ..models.loading import load_clip_on_all_ranks
from ..models.student import trainable_tower
from ..runs.checkpoint_writer import Checkpoints
from ..training.engine import Engine
from ..training.numerics import numerics
from .out_file import scratch_folder
from .report import BenchmarkReport, BenchmarkTable
from .timing import Spread, timed

TICK_S = 0.001


@dataclass
class CheckpointBenchmark:
    """Checkpoints of a configuration's student, `rounds` of them, written below `folder` (None: a scratch folder)."""

    config: Config
    rounds: int = 3
    folder: Path | None = None

    def run(self, out: Path) -> None:
        """Measure, print the table, and write it to `out`. UserError where the folder cannot be written."""
        with (
            numerics(self.config.engine),
            process_group(self.config.engine.device) as ranks,
            scratch_folder(self.folder, "--folder") as scratch,
        ):
            clip = load_clip_on_all_ranks(self.config.student, ranks, self.config.seed)
            engine = Engine(self.config, trainable_tower(self.config, clip, None), ranks)
            found, size = checkpoint_times(engine, ranks, scratch, self.rounds)
            if ranks.is_first:
                self._report(found, size).publish(out, ranks.device)

    def _report(self, found: dict[str, list[float]], size: int) -> BenchmarkReport:
        table = BenchmarkTable(
            f"A checkpoint of {size / 1e9:.3g} GB, seconds",
            ["student", "the loop stands still: copy", "hand over", "then, beside the loop: write", "longest pause"],
        )
        table.rows.append(
            [self.config.student.arch or self.config.student.weights, *(str(Spread.of(s)) for s in found.values())]
        )
        note = (
            f"Median (smallest-largest) of {self.rounds}. The copy brings weights and moments to the first rank's "
            "memory; a thread writes them. Longest pause: of a loop that asks the time every millisecond meanwhile."
        )
        numbers = {"config": self.config.model_dump(mode="json"), "bytes": size, "seconds": found}
        return BenchmarkReport([table], numbers, [note])


def checkpoint_times(engine: Engine, ranks: Ranks, folder: Path, rounds: int) -> tuple[dict[str, list[float]], int]:
    """(seconds of each part of `rounds` checkpoints below `folder`, bytes of one), as the first rank has them.

    The loop stands still for "copy" and "hand over". Collective. UserError on all ranks where one cannot be written.
    """
    checkpoints = Checkpoints(folder, keep_last=1)
    found: dict[str, list[float]] = {"copy": [], "hand over": [], "write": [], "longest pause": []}

    def save(number: int, weights: dict[str, Tensor], moments: dict[str, Tensor], updates: int) -> int:
        began = time.perf_counter()
        checkpoints.save(number, weights, moments, {"step": number, "updates": updates})
        found["hand over"].append(time.perf_counter() - began)
        pause = _longest_pause(checkpoints)
        found["write"].append(time.perf_counter() - began)
        found["longest pause"].append(pause)
        checkpoints.wait()
        return sum(tensor.nbytes for tensor in (*weights.values(), *moments.values()))

    size = 0
    for number in range(1, rounds + 1):
        made = []
        found["copy"].append(timed(lambda made=made: made.append(engine.full_state()), ranks.device))
        size = ranks.run_on_first(lambda number=number, made=made: save(number, *made.pop()))
    return found, size


def _longest_pause(checkpoints: Checkpoints) -> float:
    """The longest time that this thread could not run until the write under way was done."""
    longest, last = 0.0, time.perf_counter()
    while checkpoints.is_writing:
        time.sleep(TICK_S)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return longest
