"""`mmtard bench train`: the training step phase by phase, what each option buys, and the published step beside."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ..config import Config
from ..distillation.task import DistillationTask
from ..distributed.progress import WorkProgress
from ..distributed.ranks import Ranks, process_group
from ..errors import UserError
from ..runs.metrics import SilentLogger
from ..training.numerics import numerics
from ..training.record import Agreed, StepRecord
from ..training.step import optimizer_step
from ..training.throughput import memory
from .around_step import Around, AroundStep, report_around
from .attack_cost import PASSES, AttackPasses, share_of_passes
from .instruments import instrument, instrument_task, timed_collectives
from .matrix import matrix_rate
from .models import ResidentParts, resident_parts
from .options import as_open_clip, every_target_stored, one_noisy_step, recomputing, uncompiled, without_attack_copy
from .out_file import scratch_folder
from .phase_flops import phase_flops
from .phases import PhaseClock
from .published import PublishedOptions, PublishedStep, check_comparable
from .report import BenchmarkReport, BenchmarkTable
from .timing import Spread, alternately, ratios, timed

PUBLISHED, OURS = "published", "mmtard"


@dataclass
class Variant:
    """One way to take a step. `run` takes one step; what was measured is added."""

    name: str
    run: Callable[[], object]
    flops_by_phase: dict[str, float]  # of an image
    seconds: list[float] = field(default_factory=list)  # a step, round by round
    phases: list[dict[str, float]] = field(default_factory=list)
    communication: list[float] = field(default_factory=list)  # seconds in collectives, whichever phase they are in
    memory: float = 0.0  # GiB, the largest of the rounds; the models of all variants count

    @property
    def flops(self) -> float:
        """FLOPs of an image."""
        return sum(self.flops_by_phase.values())


@dataclass
class TrainingBenchmark:
    """What is to be measured of a configuration's training step.

    against: "published" adds the published step and its variants. steps: a round's, of each variant. variants: names
    of those to measure, None for all. trace: the file of a profile of one step.
    """

    config: Config
    against: str | None = None
    steps: int = 1
    rounds: int = 3
    warm_up: int = 1
    classes: int = 1000
    variants: list[str] | None = None
    trace: Path | None = None
    record: StepRecord = field(init=False, repr=False)  # of the steps' numbers, over the ranks
    agreed: Agreed = field(init=False, repr=False)  # those of the last step
    passes: AttackPasses | None = field(init=False, default=None, repr=False)
    pass_seconds: list[float] = field(init=False, default_factory=list, repr=False)  # round by round
    first: dict[str, float] = field(init=False, default_factory=dict, repr=False)  # seconds of a variant's first run

    def run(self, out: Path) -> None:
        """Measure, print the tables, and write them to `out`. UserError for what the configuration lacks."""
        with (
            numerics(self.config.engine),
            process_group(self.config.engine.device) as ranks,
            WorkProgress(ranks.is_first) as progress,
            timed_collectives(PhaseClock(ranks.device)) as collectives,
            scratch_folder() as scratch,
        ):
            if self.against:
                check_comparable(self.config, ranks.world_size)
            progress.part("models")
            clock = PhaseClock(ranks.device)
            parts = resident_parts(self.config, ranks, self.classes, published=self.against is not None)
            self.passes = AttackPasses(parts) if parts.task.objective else None
            self.record = StepRecord(Nameless(), ranks, SilentLogger(), self.config.train.batch_size, {})
            variants = self._chosen(self._published(parts, clock) + self._ours(parts, clock, ranks))
            self._measure(variants, clock, collectives, ranks, progress)
            ours, around = next((v for v in variants if v.name == OURS), None), {}
            if ours:
                step_s = Spread.of(ours.seconds).median
                rest = AroundStep(self.config, parts, step_s, self.agreed, ranks, scratch, self.rounds, progress)
                around = rest.measure()
            progress.part("matrix product")
            if self.trace:
                self._write_trace(ours or variants[-1], ranks)
            if ranks.is_first:
                report = self._report(variants, ours, around, ranks)
        if ranks.is_first:
            report.publish(out, ranks.device)

    def _chosen(self, variants: list[Variant]) -> list[Variant]:
        names = [v.name for v in variants]
        unknown = [name for name in self.variants or () if name not in names]
        if unknown:
            quoted = ", ".join(f"'{name}'" for name in names)
            raise UserError(f"--variants: no '{unknown[0]}' here; those of this configuration: {quoted}")
        return [v for v in variants if self.variants is None or v.name in self.variants]

    def _published(self, parts: ResidentParts, clock: PhaseClock) -> list[Variant]:
        if parts.published is None:
            return []
        step = PublishedStep(self.config, parts.published, clock)
        batch, images = parts.batch, parts.batch.pixels(parts.batch.images.device)
        with torch.no_grad():
            clean = parts.published.clean(images)
        forward = parts.open_clip_flops

        def by_phase(clean_forwards: int) -> dict[str, float]:
            teachers = clean_forwards * forward["clean"] + forward["robust"]
            attack = 2 * self.config.attack.steps * forward["student"]
            return {"teachers": teachers, "attack": attack, "student": 6 * forward["student"]}

        options = {
            PUBLISHED: (PublishedOptions(), by_phase(2)),
            "published, no third teacher": (PublishedOptions(third_teacher=False), by_phase(1)),
            "published, clean stored": (PublishedOptions(clean_embeddings=clean), by_phase(1)),
            "lean loop": (PublishedOptions(False, clean, frozen_attack=True), by_phase(0)),
        }
        return [
            Variant(name, lambda o=chosen: step(images, batch.labels, batch.seeds, o), counted)
            for name, (chosen, counted) in options.items()
        ]

    def _ours(self, parts: ResidentParts, clock: PhaseClock, ranks: Ranks) -> list[Variant]:
        compiled = parts.engine.ds.module.graph is not None
        all_stored = every_target_stored(self.config, parts)
        instrument(parts.engine, clock)
        noisy = one_noisy_step(self.config, parts)
        for task in filter(None, (parts.task, all_stored, noisy)):
            instrument_task(task, clock)
        own, stored = parts.stored_by_configuration(parts.task), parts.stored(parts.task)
        plain = "open_clip's own towers, uncompiled" if compiled else "open_clip's own towers"
        found = [self._variant(OURS, parts, parts.task, ranks, clock, own)]
        if own:
            found.append(self._variant(f"{OURS}, nothing stored", parts, parts.task, ranks, clock, {}))
        if len(stored) > len(own):
            name = f"{OURS}, {' and '.join(stored)} stored"
            found.append(self._variant(name, parts, parts.task, ranks, clock, stored))
            if parts.published is not None:
                # The lean loop's own arithmetic: what is left between the two is what mmtard does around it.
                found.append(self._variant(f"{name}, {plain}", parts, parts.task, ranks, clock, stored, as_open_clip))
        if all_stored:
            name = f"{OURS}, every target stored"
            found.append(self._variant(name, parts, all_stored, ranks, clock, parts.stored(all_stored)))
        if noisy:
            found.append(self._variant(f"{OURS}, one noisy step (N-FGSM)", parts, noisy, ranks, clock, own))
        without = {plain: as_open_clip}
        if self.config.engine.checkpoint_activations and not self.config.engine.checkpoint_attack:
            without["checkpoint_attack"] = recomputing
        if parts.engine.attack_copy:
            without["no attack copy"] = without_attack_copy
        if compiled:
            without["uncompiled"] = uncompiled
        for words, option in without.items():
            found.append(self._variant(f"{OURS}, {words}", parts, parts.task, ranks, clock, own, option))
        clock.seconds()  # forget what was asked to make them
        return found

    def _variant(
        self,
        name: str,
        parts: ResidentParts,
        task: DistillationTask,
        ranks: Ranks,
        clock: PhaseClock,
        stored: dict[str, Tensor],
        option: Callable[[ResidentParts], AbstractContextManager] | None = None,
    ) -> Variant:
        """A step of `task`. stored: embeddings that come with the batch. option: what is otherwise while it runs."""
        batch = replace(parts.batch, teacher_embeddings=stored)
        of_towers = parts.open_clip_flops if option is as_open_clip else parts.flops
        forward = {model: 0.0 if model in stored else count for model, count in of_towers.items()}
        adapters = bool(self.config.student.lora)
        counted = phase_flops(forward, task.passes, task.objective, task.attack, adapters)
        lr = self.config.train.lr

        def run() -> None:
            with option(parts) if option else nullcontext():
                done = optimizer_step(task, parts.engine, batch, lr, ranks.device)
            with clock("agreement"):
                self.agreed = self.record.agree(done, batch, stop=False)

        return Variant(name, run, counted)

    def _measure(
        self,
        variants: list[Variant],
        clock: PhaseClock,
        collectives: PhaseClock,
        ranks: Ranks,
        progress: WorkProgress,
    ) -> None:
        by_name = {v.name: v for v in variants}

        def run(variant: Variant) -> None:
            if ranks.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(ranks.device)
            collectives.seconds()
            for _ in range(self.steps):
                if variant.name in self.first:
                    variant.run()
                else:
                    self.first[variant.name] = timed(variant.run, ranks.device)
            variant.phases.append({name: s / self.steps for name, s in clock.seconds().items()})
            variant.communication.append(sum(collectives.seconds().values()) / self.steps)
            variant.memory = max(variant.memory, memory(ranks.device)["memory_gib"])

        runs = {name: lambda v=v: run(v) for name, v in by_name.items()}
        work = {name: v.flops for name, v in by_name.items()}
        if self.passes and OURS in by_name:
            runs[PASSES], work[PASSES] = self.passes, work[OURS]
        found = alternately(runs, self.rounds, ranks.device, self.warm_up, progress, work)
        self.pass_seconds = found.pop(PASSES, [])
        for name, seconds in found.items():
            by_name[name].seconds = [s / self.steps for s in seconds]
            del by_name[name].phases[: self.warm_up], by_name[name].communication[: self.warm_up]

    def _write_trace(self, variant: Variant, ranks: Ranks) -> None:
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if ranks.device.type == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=kinds) as profile:
            variant.run()
        if ranks.is_first:
            self.trace.parent.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(self.trace))

    def _report(
        self, variants: list[Variant], ours: Variant | None, around: dict[str, Around], ranks: Ranks
    ) -> BenchmarkReport:
        images = self.config.train.batch_size
        rate = matrix_rate(ranks.device, self.config.engine.precision)
        base = next((v for v in variants if v.name == PUBLISHED), variants[0])
        numbers = {"config": self.config.model_dump(mode="json"), "matrix_flops": rate, "world_size": ranks.world_size}
        report = BenchmarkReport(numbers=numbers)
        on_gpu = ranks.device.type == "cuda"
        columns = ["", "s a step", "images/s", f"x {base.name}", "GFLOP an image", "of a matrix product"]
        if on_gpu:  # on a CPU the process's memory says nothing of one variant
            columns.append("GiB")
        title = f"A training step: {images} images on {ranks.world_size} x {ranks.device.type}"
        table = BenchmarkTable(title, columns)
        report.tables = [table, _phase_table(variants)]
        report.numbers["variants"] = {}
        for v in variants:
            ratio = Spread.of(ratios(base.seconds, v.seconds))
            share = images / ranks.world_size * v.flops / Spread.of(v.seconds).median / rate
            table.rows.append(_row(v, images, ratio, share)[: len(columns)])
            report.numbers["variants"][v.name] = {
                "seconds": v.seconds,
                "phases": v.phases,
                "communication": v.communication,
                "first_step_seconds": self.first[v.name],
                "flops_an_image": v.flops,
                "flops_by_phase": v.flops_by_phase,
                "share_of_matrix_product": share,
                "ratio": vars(ratio),
                "memory_gib": v.memory,
            }
        report.notes.append(
            f"Median (smallest-largest) of {self.rounds} rounds of {self.steps} steps each, all variants in every "
            f"round. The matrix product reaches {rate / 1e9:.4g} GFLOP/s."
        )
        if on_gpu:
            report.notes.append("GiB: the peak while the variant ran; the models of all variants lie there, too.")
        if ours:
            self._note_attack(ours, report)
            report_around(around, self.rounds, report)
        return report

    def _note_attack(self, ours: Variant, report: BenchmarkReport) -> None:
        first = self.first[OURS]
        report.notes.append(f"The first step of '{OURS}' took {first:.3g} s, what is compiled included.")
        if self.pass_seconds:
            attack = [phases["attack"] for phases in ours.phases]
            share, sentence = share_of_passes(attack, self.pass_seconds, self.passes.number)
            report.numbers["attack_by_its_passes"] = vars(share)
            report.notes.append(sentence)


def _row(v: Variant, images: int, ratio: Spread, share: float) -> list[str]:
    seconds = Spread.of(v.seconds)
    return [
        v.name,
        str(seconds),
        f"{images / seconds.median:.4g}",
        f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})",
        f"{v.flops / 1e9:.4g}",
        f"{100 * share:.0f} %",
        f"{v.memory:.2f}",
    ]


def _phase_table(variants: list[Variant]) -> BenchmarkTable:
    names = list(dict.fromkeys(name for v in variants for phases in v.phases for name in phases))
    columns = ["", *names, "rest", "of all this, in collectives"]
    table = BenchmarkTable("Seconds of each phase: median, and below it smallest-largest", columns)
    for v in variants:
        phases = [[p.get(name, 0.0) for p in v.phases] for name in names]
        rest = [s - sum(p.values()) for s, p in zip(v.seconds, v.phases)]
        table.rows.append([v.name, *(Spread.of(seconds).in_two_lines for seconds in (*phases, rest, v.communication))])
    return table


class Nameless:
    """A data set whose samples are called by their numbers."""

    def name(self, sample: int) -> str:
        return str(sample)
