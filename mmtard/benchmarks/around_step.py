"""What a run does around its steps: it makes batches, writes each step's numbers, and stands still for checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing, redirect_stdout
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path

from ..config import Config, Data
from ..data.dataset import Dataset, open_dataset
from ..data.paths import expand_shards, index_file, is_remote
from ..data.stream import train_stream
from ..distributed.progress import WorkProgress
from ..distributed.ranks import Ranks
from ..errors import UserError
from ..runs import trackers
from ..runs.metrics import MetricLogger
from ..training.record import Agreed
from ..training.setup import step_cost
from .checkpoint import checkpoint_times
from .models import ResidentParts
from .report import BenchmarkReport, BenchmarkTable
from .timing import Spread, alternately

MOST_ROWS = 1000  # of a round: among more, the console's one line has no weight


@dataclass(frozen=True)
class Around:
    """One thing that a run does around its steps, or why it was not measured.

    seconds: of one of it, round by round. settings: those that it was measured under. added: from its median seconds,
    what it adds to a step's time, as a share of that.
    """

    what: str
    settings: str
    added: Callable[[float], float]
    seconds: list[float]
    why_not: str = ""

    def row(self, name: str) -> list[str]:
        """Its cells of the table."""
        if self.why_not:
            return [f"{name}: not measured: {self.why_not}", "", "", self.settings]
        spread = Spread.of(self.seconds)
        return [f"{name}: {self.what}", str(spread), f"{100 * self.added(spread.median):.2g} %", self.settings]

    def numbers(self) -> dict:
        """What JSON keeps of it."""
        if self.why_not:
            return {"not_measured": self.why_not}
        spread = Spread.of(self.seconds)
        return {"seconds": self.seconds, **vars(spread), "added_share": self.added(spread.median)}


@dataclass
class AroundStep:
    """What the run of a configuration does around its steps, as its first rank does it, in each of `rounds` rounds.

    step_s: seconds of a step. agreed: the numbers of one. scratch: a folder for what is written.
    """

    config: Config
    parts: ResidentParts
    step_s: float
    agreed: Agreed
    ranks: Ranks
    scratch: Path
    rounds: int
    progress: WorkProgress

    def measure(self) -> dict[str, Around]:
        """Each of them by name. Collective."""
        return {"load": self.load(), "logging": self.logging(), "checkpoint": self.checkpoint()}

    def load(self) -> Around:
        """How long a batch takes one process. Collective, as are the next two."""
        workers, share = self.config.data.workers, self.config.train.batch_size // self.ranks.world_size

        def added(seconds: float) -> float:
            # Workers make batches beside the step, and the loop waits for what that takes longer than the step.
            return max(0.0, seconds / workers / self.step_s - 1) if workers else seconds / self.step_s

        of_first = partial(self.ranks.run_on_first, self.batch_seconds)
        return self._measured(f"a batch of {share}, by one process", f"data.workers={workers}", added, of_first)

    def logging(self) -> Around:
        """How long a step's numbers take the loop."""
        log = self.config.log
        settings = f"log.every={log.every} log.tensorboard={str(log.tensorboard).lower()}"
        if log.wandb:
            settings += ", without log.wandb"
        of_first = partial(self.ranks.run_on_first, self.row_seconds)
        return self._measured("the numbers of a step", settings, lambda s: s / self.step_s, of_first)

    def checkpoint(self) -> Around:
        """How long the loop stands still for a checkpoint."""
        every, steps = self.config.checkpoint.every, self.config.train.steps
        settings = f"checkpoint.every={every}" + (f" train.steps={steps}" if steps < every else "")
        every = min(every, steps)  # a run saves at its end, too
        return self._measured("the loop stands still", settings, lambda s: s / every / self.step_s, self.stalls)

    def _measured(
        self, what: str, settings: str, added: Callable[[float], float], measure: Callable[[], list[float]]
    ) -> Around:
        # What cannot be measured, such as a checkpoint on a full disk, must not take the steps' times with it.
        try:
            return Around(what, settings, added, measure())
        except UserError as error:
            return Around(what, settings, added, [], why_not=str(error))

    def batch_seconds(self) -> list[float]:
        """Seconds that this process alone needs for the rank's share of a batch."""
        data = self.config.data
        alone = self.config.model_copy(update={"data": data.model_copy(update={"workers": 0})})
        image_size = self.parts.engine.ds.module.image_size
        batches = iter(train_stream(alone, indexed_dataset(data), self.ranks, image_size, stop=self.rounds + 1))
        with closing(batches):
            return self._alternately("loading", lambda: next(batches))

    def row_seconds(self) -> list[float]:
        """Seconds of the loop that a step's numbers take: all that `log.every` steps write, shared out among them."""
        rows, log = min(self.config.log.every, MOST_ROWS), self.config.log
        local = {"run_dir": str(self.scratch), "log": log.model_copy(update={"wandb": None})}  # nothing leaves here
        opened = trackers.chosen(self.config.model_copy(update=local), 0)
        steps = count(1)
        with open(os.devnull, "w") as console, redirect_stdout(console):
            logger = MetricLogger(self.scratch, 0, (1 + self.rounds) * rows, log.every, opened)
            logger.begin(step_cost(self.config, self.ranks, self.parts.task, self.parts.flops))

            def write() -> None:
                for step in islice(steps, rows):
                    logger.step(step, self.agreed, self.agreed.update, self.config.train.lr)

            with closing(logger):
                seconds = self._alternately("logging", write)
        if logger.failure:
            raise logger.failure
        return [s / rows for s in seconds]

    def stalls(self) -> list[float]:
        """Seconds that the loop stands still for a checkpoint. Collective."""
        self.progress.part("checkpoints")
        found, _ = checkpoint_times(self.parts.engine, self.ranks, self.scratch, self.rounds)
        return self.ranks.run_on_first(lambda: [*map(sum, zip(found["copy"], found["hand over"]))])

    def _alternately(self, name: str, run: Callable[[], object]) -> list[float]:
        return alternately({name: run}, self.rounds, self.ranks.device, progress=self.progress)[name]


def report_around(around: dict[str, Around], rounds: int, report: BenchmarkReport) -> None:
    """Add the table, the numbers and a sentence on how to read them."""
    table = BenchmarkTable("Around mmtard's step", ["", "seconds", "adds to a step", "settings"])
    table.rows = [one.row(name) for name, one in around.items()]
    report.tables.append(table)
    report.numbers["around_the_step"] = {name: one.numbers() for name, one in around.items()}
    report.notes.append(
        f"Around the step: median (smallest-largest) of {rounds}, on the first rank. Workers with cores of their own "
        "load beside the step, and a thread writes the checkpoint beside the loop: that adds nothing while it keeps up."
    )


def indexed_dataset(data: Data) -> Dataset:
    """The data set whose index is at hand. UserError where reading it is more than a look: what measures it then."""
    try:
        shards = expand_shards(data.shards)
    except UserError:
        raise UserError("no shards; `mmtard bench data` measures it") from None
    if any(map(is_remote, shards)):
        raise UserError("shards to be fetched; `mmtard bench data` measures it")
    if not index_file(data, shards).is_file():
        raise UserError("shards without an index; `mmtard bench data` makes it, and measures")
    return open_dataset(data, look_again=False)
