"""`mmtard bench data`: images/s that a core reads from shards, what the step takes, and how long the loop waits."""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..config import Config, Data
from ..data.dataset import Dataset, open_dataset, open_dataset_on_all_ranks
from ..data.images import Transform, decode
from ..data.samples import SampleReader, SampleRequest
from ..data.shard_writer import write_shards
from ..data.staging import staging_for
from ..data.stream import train_stream
from ..distributed.progress import WorkProgress
from ..distributed.ranks import Ranks, process_group
from ..models.loading import load_skeleton
from ..training.numerics import numerics
from ..training.step import optimizer_step
from .machine import STORED
from .models import ResidentParts, resident_parts
from .out_file import scratch_folder
from .pictures import draw_pictures
from .report import BenchmarkReport, BenchmarkTable
from .timing import Spread, wait_for_device

STAGES = ("read", "decode", "resize and crop", "batch")


@dataclass(frozen=True)
class CoreRate:
    """How fast one core makes images for the student from shards."""

    images_per_s: list[float]  # round by round, by the clock on the wall: other programs and the disk count
    images_per_cpu_s: list[float]  # by the processor's own clock
    milliseconds: dict[str, float]  # of the processor an image takes, stage by stage: the best round's
    kilobytes: float  # an encoded image


@dataclass
class DataBenchmark:
    """What is to be measured of a configuration's shards and of its loop.

    drawn: so many images are drawn and written as shards, in place of those of `data.shards`. images: read in each of
    `rounds` rounds, on one core. resize, quality: of the pre-resized shards that the same images are written to.
    steps: of the training loop, after a first one; 0: the loop is left out.
    """

    config: Config
    drawn: int | None = None
    images: int = 256
    rounds: int = 3
    resize: int = 256
    quality: int = 90
    steps: int = 10

    def run(self, out: Path) -> None:
        """Measure, print the tables, and write them to `out`. UserError for what the configuration lacks."""
        with ExitStack() as stack:
            scratch = stack.enter_context(scratch_folder())
            stack.enter_context(numerics(self.config.engine))
            ranks = stack.enter_context(process_group(self.config.engine.device))
            progress = stack.enter_context(WorkProgress(ranks.is_first))
            config = ranks.run_on_first(lambda: self._with_drawn(scratch, progress)) if self.drawn else self.config
            report = BenchmarkReport(numbers={"config": config.model_dump(mode="json")})
            if ranks.is_first:
                self._measure_core(config, scratch, report, progress)
            ranks.barrier()
            if self.steps:
                self._measure_loop(config, ranks, report, progress)
        if ranks.is_first:
            report.publish(out, ranks.device)

    def _with_drawn(self, scratch: Path, progress: WorkProgress) -> Config:
        progress.part(f"drawing {self.drawn} images", self.drawn)
        draw_pictures(scratch / "drawn", self.drawn or 0, drawn=progress.advance)
        progress.part(f"writing {self.drawn} images as shards")
        write_shards(scratch / "drawn", scratch / "drawn-shards", samples_per_shard=128, progress=False)
        own = {"shards": str(scratch / "drawn-shards"), "index": None, "classnames": None}
        return self.config.model_copy(update={"data": self.config.data.model_copy(update=own)})

    # ---------------------------------------------------------------- one core

    def _measure_core(self, config: Config, scratch: Path, report: BenchmarkReport, progress: WorkProgress) -> None:
        progress.part(f"shards of {self.resize} px")
        dataset = open_dataset(config.data)
        size = load_skeleton(config.student, "student").tower().image_size
        transform = Transform(size, config.data.resize, config.data.crop_scale, config.data.flip)
        kinds = {
            STORED: SampleReader(dataset, transform, need_labels=False, staging=staging_for(dataset, config.data.cache))
        }
        resized = self._pre_resized(kinds[STORED], scratch)
        kinds[f"pre-resized: {self.resize} px, quality {self.quality}"] = SampleReader(
            resized, transform, need_labels=False
        )
        found = core_rates(kinds, self.images, self.rounds, progress)
        table = BenchmarkTable(
            f"One core: images for a student of {size} px from shards",
            ["shards", "images/s", "images a CPU second", *(f"CPU ms {stage}" for stage in STAGES), "kB an image"],
        )
        for name, rate in found.items():
            stages = [f"{rate.milliseconds[stage]:.2f}" for stage in STAGES]
            rates = [str(Spread.of(of_rounds)) for of_rounds in (rate.images_per_s, rate.images_per_cpu_s)]
            table.rows.append([name, *rates, *stages, f"{rate.kilobytes:.3g}"])
        report.tables.append(table)
        report.numbers["core"] = {name: vars(rate) for name, rate in found.items()}
        report.notes.append(
            f"Median (smallest-largest) of {self.rounds} rounds of {self.images} images. Where other programs run, "
            "images a CPU second are what a core of its own would give."
        )

    def _pre_resized(self, samples: SampleReader, scratch: Path) -> Dataset:
        """The first images of a data set, written as `mmtard shards --resize` does."""
        dataset, images = samples.dataset, scratch / "images" / "0"
        images.mkdir(parents=True)
        for sample in range(min(self.images, len(dataset))):
            extension = Path(dataset.file_name(sample)).suffix
            (images / f"{sample:06d}{extension}").write_bytes(samples.reader.image(sample))
        write_shards(
            images.parent, scratch / "resized", resize=self.resize, quality=self.quality, jobs=1, progress=False
        )
        shutil.rmtree(images.parent)
        return open_dataset(Data(shards=str(scratch / "resized")))

    # ---------------------------------------------------------------- the loop

    def _measure_loop(self, config: Config, ranks: Ranks, report: BenchmarkReport, progress: WorkProgress) -> None:
        progress.part("models of the loop")
        dataset = open_dataset_on_all_ranks(config.data, ranks)
        classes = max(int(dataset.labels.max()) + 1, 2)
        parts = resident_parts(config, ranks, classes, published=False, samples=len(dataset))
        waits, steps = loop_times(config, dataset, ranks, parts, self.steps, progress)
        waits, steps = ([*map(max, zip(*ranks.all_gather(times)))] for times in (waits, steps))
        share = sum(waits) / (sum(waits) + sum(steps))
        needed = config.train.batch_size / ranks.world_size / Spread.of(steps).median
        per_core = report.numbers["core"][STORED]["images_per_cpu_s"] if ranks.is_first else [1.0]
        rate = Spread.of(per_core).median
        table = BenchmarkTable(
            f"The loop: {config.train.batch_size} images a step, {ranks.world_size} x {ranks.device.type}, "
            f"data.workers={config.data.workers} a rank",
            ["s a step", "images/s a rank takes", "cores it takes", "s waited a step", "waited"],
            [
                [
                    str(Spread.of(steps)),
                    f"{needed:.4g}",
                    f"{needed / rate:.2g}",
                    str(Spread.of(waits)),
                    f"{100 * share:.2f} %",
                ]
            ],
        )
        report.tables.append(table)
        report.numbers["loop"] = {
            "seconds": steps,
            "waited": waits,
            "waited_share": share,
            "images_per_s_needed_a_rank": needed,
            "cores_needed_a_rank": needed / rate,
        }
        report.notes.append(
            f"Waited: of {self.steps} steps after the first, whose wait for the workers' start does not count; of all "
            "ranks, the one that waited longest."
        )


def core_rates(kinds: dict[str, SampleReader], images: int, rounds: int, progress: WorkProgress) -> dict[str, CoreRate]:
    """How fast this process alone makes batches of each kind's first `images` samples, in turn."""
    found: dict[str, list[_Round]] = {name: [] for name in kinds}
    progress.part("", rounds * len(kinds))
    for number in range(rounds):
        for name, samples in kinds.items():
            with progress.running(f"{name}: round {number + 1} of {rounds}"):
                found[name].append(_read_once(samples, images))
    return {
        name: CoreRate(
            [of_round.images / of_round.seconds for of_round in rounds_],
            [of_round.images / of_round.cpu_seconds for of_round in rounds_],
            {stage: min(1e3 * r.stages[stage] / r.images for r in rounds_) for stage in STAGES},
            rounds_[0].size / rounds_[0].images / 1e3,
        )
        for name, rounds_ in found.items()
    }


@dataclass(frozen=True)
class _Round:
    """Images read once: seconds as batches, CPU seconds of each stage alone, bytes."""

    images: int
    seconds: float
    cpu_seconds: float
    stages: dict[str, float]
    size: int


def _read_once(samples: SampleReader, images: int) -> _Round:
    ids = np.arange(min(images, len(samples.dataset)), dtype=np.int64)
    seeds = ids.astype(np.uint64)
    stages: dict[str, float] = {}
    made: dict[str, list] = {}

    def stage(name: str, work) -> None:
        began = time.thread_time()
        made[name] = [work(i) for i in range(len(ids))]
        stages[name] = time.thread_time() - began

    stage("read", lambda i: samples.reader.image(int(ids[i])))
    stage("decode", lambda i: decode(made["read"][i]))
    stage("resize and crop", lambda i: samples.transform(made["decode"][i], int(seeds[i])))
    size = sum(map(len, made["read"]))
    made.clear()
    chunks = [slice(at, at + 32) for at in range(0, len(ids), 32)]
    began, cpu_began = time.perf_counter(), time.thread_time()
    for chunk in chunks:
        samples[SampleRequest(ids[chunk], seeds[chunk], None)]
    seconds, cpu_seconds = time.perf_counter() - began, time.thread_time() - cpu_began
    stages["batch"] = max(0.0, cpu_seconds - sum(stages.values()))
    return _Round(len(ids), seconds, cpu_seconds, stages, size)


def loop_times(
    config: Config, dataset: Dataset, ranks: Ranks, parts: ResidentParts, steps: int, progress: WorkProgress
) -> tuple[list[float], list[float]]:
    """(seconds that the loop waited for each batch, seconds of each step), after a first step. Collective."""
    train = config.train.model_copy(update={"steps": steps + 1})
    stored = parts.stored_by_configuration(parts.task)
    waits, took = [], []
    batches = iter(
        train_stream(config.model_copy(update={"train": train}), dataset, ranks, parts.engine.ds.module.image_size)
    )
    progress.part("", steps + 1)
    for number in range(steps + 1):
        progress.say(f"the loop: step {number} of {steps}" if number else "the loop: a first step")
        began = time.perf_counter()
        batch = next(batches)
        had = time.perf_counter()
        labels = batch.labels.clamp_min(0)
        batch = replace(batch, labels=labels, teacher_embeddings=stored)
        optimizer_step(parts.task, parts.engine, batch, config.train.lr, ranks.device)
        wait_for_device(ranks.device)
        waits.append(had - began)
        took.append(time.perf_counter() - had)
        progress.advance()
    batches.close()
    return waits[1:], took[1:]
