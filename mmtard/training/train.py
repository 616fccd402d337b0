"""The training loop: shards in, a robust student out, every interruption survived."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from ..config import Config
from ..data.dataset import open_dataset_on_all_ranks
from ..data.images import Transform
from ..data.order import Order
from ..data.samples import Batch
from ..data.staging import Staging
from ..data.stream import TrainStream
from ..distillation.task import DistillationTask
from ..distributed.interruption import EXIT_REQUEUE, Interruption
from ..distributed.ranks import Ranks, start, stop
from ..embeddings import identity
from ..errors import RunError
from ..models import image_tower, loading, student
from ..models.image_tower import DTYPES
from ..runs import checkpoints, folder, history, trackers
from ..runs.checkpoints import Checkpoints
from ..runs.metrics import MetricLogger
from . import class_targets, overfitting_alarm, probe, setup, throughput
from .engine import Engine, UpdateResult
from .optimizer import learning_rate
from .record import batch_digest
from .step_terms import TermSums
from .throughput import cost
from .watchdog import Watchdog


def train(config: Config, interruption: Interruption) -> int:
    """Train or go on training the run of `config`; 0 when it is complete, `preempt.REQUEUE` when it was asked to stop.

    A set `interruption` is acted on after the step under way, so that every start makes progress.
    Collective over the ranks of this launch. Raises UserError for what the user can mend, RunError for what ended the run.
    """
    ranks = start(config.engine.device)
    with Watchdog(config, ranks) as watchdog:
        status = Trainer(config, ranks, watchdog).train(interruption)
    stop()
    return status


class Trainer:
    """A run that is set up: data, models, engine and where it goes on from."""

    def __init__(self, config: Config, ranks: Ranks, watchdog: Watchdog):
        self.config, self.ranks, self.watchdog = config, ranks, watchdog
        torch.manual_seed(config.seed)
        self.dataset = open_dataset_on_all_ranks(config.data, ranks)
        ranks.run_on_first(lambda: probe.check(config))
        self.folder = folder.prepare(config, self.dataset.fingerprint, ranks)
        self.step = self.folder.step
        watchdog.at(self.step, "set-up")
        self.bad_in_a_row = self.folder.state.get("bad_in_a_row", 0)
        self.skipped, self.replaced = self.folder.state.get("skipped", 0), self.folder.state.get("replaced", 0)
        self.checkpoints = Checkpoints(self.folder.path, config.checkpoint.keep_last, config.checkpoint.keep_every)
        self.metrics: MetricLogger | None = None
        if ranks.is_first:
            self.checkpoints.clean()
            self.metrics = MetricLogger(
                self.folder.path, self.step, config.train.steps, config.log.every, trackers.chosen(config, self.step)
            )
            self.probe = probe.Probe(config, self.checkpoints, self.metrics, self.step)

    def train(self, interruption: Interruption) -> int:
        """Run to the last step or to an interruption; the exit status."""
        try:
            return self._train(interruption)
        finally:
            if self.ranks.is_first:
                self.metrics.close()

    def _train(self, interruption: Interruption) -> int:
        if self.step < self.config.train.steps:
            self._build()
            if not self._loop(interruption):
                self._end(
                    lambda: history.kind_of_stop(interruption.signal),
                    f"stopped by {interruption.name} after step {self.step}",
                    interruption,
                )
                return EXIT_REQUEUE
        self._end(lambda: history.COMPLETE, f"complete, {self.step} steps done", interruption)
        return 0

    def _build(self) -> None:
        config, ranks, run = self.config, self.ranks, self.folder
        start = student.start_model(config, run.path, bool(run.checkpoint), ranks)
        clips = {"student": start} | {
            name: loading.load_clip(t, config.seed, f"teachers.{name}") for name, t in config.ensemble.items()
        }
        for name, clip in clips.items() if config.needs_tokens else ():
            image_tower.require_tokens(clip.tower(), name)
        head, self.targets = class_targets.build_class_targets(config, run.path, clips, self.dataset, ranks)
        tower = student.trainable_tower(config, start, run.checkpoint)
        self.image_size = tower.image_size
        self.stored = identity.open_stores(config, clips, self.image_size, self.dataset.fingerprint, ranks)
        forward = {
            name: 0 if name in self.stored else throughput.forward_flops(clip.tower()) for name, clip in clips.items()
        }
        self.engine = Engine(config, tower, ranks)
        if run.checkpoint:
            self.engine.restore(checkpoints.read_optimizer(run.checkpoint), run.state["updates"])
        ensemble = setup.build_teachers(
            config.ensemble, clips, head, self.stored, ranks, DTYPES[config.engine.precision]
        )
        self.distillation = DistillationTask(config, self.engine, head["student"], ensemble)
        self.distillation.state |= run.state.get("method", {})
        self.alarm = overfitting_alarm.OverfittingAlarm(config, self.distillation, ranks, self.engine.micro_batch_size)
        self.sample_flops = throughput.sample_flops(
            forward, self.distillation.passes, self.distillation.objective, config.attack, bool(config.student.lora)
        )
        self.peak_flops = throughput.peak_flops(ranks.device)
        self._introduce(head, ensemble)

    def _introduce(self, head, ensemble) -> None:
        placed = self.ranks.all_gather({name: teacher.bytes_here for name, teacher in ensemble.items()})
        if not self.ranks.is_first:
            return
        config, say = self.config, self.metrics.print
        origin = f"goes on from {self.folder.checkpoint.name}" if self.folder.checkpoint else "starts"
        say(
            f"{self.folder.path}: {config.method.name} {origin}, {self.ranks.world_size} x {self.ranks.device.type}, ZeRO {config.engine.zero_stage}, {config.engine.precision}"
        )
        classes = {
            "labels": f" of {len(head['student'].class_embeddings)} classes",
            "captions": " of classes by caption",
            "none": "",
        }[config.data.targets]
        say(
            f"{len(self.dataset)} samples{classes}, images {self.image_size} px, logit scale {head['student'].logit_scale:.4g}"
        )
        for name, teacher in ensemble.items():
            mib = ", ".join(f"{held[name] / 2**20:.2f}" for held in placed)
            say(f"teacher {name}: {teacher.placement}, {teacher.bytes_whole / 2**20:.2f} MiB, a rank holds {mib} MiB")

    def _stream(self) -> TrainStream:
        config, settings = self.config, self.config.data
        order = Order(self.dataset.shard_counts, config.seed, settings.lanes, settings.window)
        transform = Transform(self.image_size, settings.resize, settings.crop_scale, settings.flip)
        return TrainStream(
            self.dataset,
            order,
            transform,
            seed=config.seed,
            batch_size=config.train.batch_size,
            rank=self.ranks.rank,
            world=self.ranks.world_size,
            start=self.step,
            stop=config.train.steps,
            workers=settings.workers,
            need_labels=config.needs_labels,
            need_captions=settings.targets == "captions",
            max_replaced=settings.max_replaced,
            staging=Staging(self.dataset, settings.cache) if self.dataset.remote else None,
            views=settings.views,
            stored=self.stored,
        )

    # ---------------------------------------------------------------- the loop

    def _loop(self, interruption: Interruption) -> bool:
        t = self.config.train
        began = time.monotonic()
        self.watchdog.at(self.step + 1, "data")
        for batch in map(self.targets, self._stream()):
            self.watchdog.at(self.step + 1, "update")
            lr = learning_rate(self.step, t.lr, t.warmup_steps, t.steps)
            terms, outcome, bad_samples = self._update(batch, lr)
            self.step += 1
            self.watchdog.at(self.step, "agreement")
            numbers = [
                *terms.sums.values(),
                batch_digest(batch.seeds),
                len(batch.replaced),
                len(bad_samples),
                bool(interruption),
            ]
            *totals, digest, replaced, bad, stop = self.ranks.sum(numbers)
            means = {name: total / t.batch_size for name, total in zip(terms.sums, totals)}
            spread = terms.quantiles(self.ranks)
            if outcome.applied:
                self.distillation.end_step(means)
            self._account(outcome, batch, replaced, bad, bad_samples)
            if self.ranks.is_first:
                seconds, began = time.monotonic() - began, time.monotonic()
                self.metrics.step(
                    {
                        "step": self.step,
                        **means,
                        **spread,
                        "lr": lr,
                        "grad_norm": outcome.grad_norm,
                        "batch": int(digest),
                    }
                    | {"skipped": self.skipped, "replaced": self.replaced}
                    | cost(
                        seconds,
                        t.batch_size,
                        self.sample_flops,
                        self.peak_flops,
                        self.ranks.world_size,
                        self.ranks.device,
                    )
                )
                self.probe.look(self.step)
            overfitting = self.alarm(self.step, batch)
            if overfitting and self.ranks.is_first:
                self.metrics.event(self.step, overfitting_alarm.EVENT, **overfitting)
            if self.bad_in_a_row >= t.max_bad_steps:
                raise RunError(
                    f"step {self.step}: {self.bad_in_a_row} steps in a row were not finite; lower train.lr or look at events.jsonl for the samples"
                )
            if self.step == t.steps or stop or self.step % self.config.checkpoint.every == 0:
                self.watchdog.at(self.step, "checkpoint")
                self._save()
            if stop and self.step < t.steps:
                return False
            self.watchdog.at(self.step + 1, "data")
        return True

    def _update(self, batch: Batch, lr: float) -> tuple[TermSums, UpdateResult, list[int]]:
        """One optimisation step on this rank's share: (the loss and its terms, outcome, samples of non-finite loss)."""
        told = TermSums()
        bad_samples: list[int] = []
        micro = self.engine.micro_batch_size
        for i in range(0, len(batch.labels), micro):
            images = batch.images[i : i + micro].to(self.ranks.device, non_blocking=True).float() / 255
            labels, seeds = (
                x[i : i + micro].to(self.ranks.device, non_blocking=True) for x in (batch.labels, batch.seeds)
            )
            given = {
                name: z[i : i + micro].to(self.ranks.device, non_blocking=True)
                for name, z in batch.teacher_embeddings.items()
            }
            loss, terms = self.distillation(images, labels, seeds, given)
            bad = ~torch.isfinite(loss.detach())
            # A sample without a finite loss makes the whole gradient so, on every rank, and the engine skips the update.
            self.engine.backward(loss.mean() * (torch.nan if bad.any() else 1.0))
            outcome = self.engine.end_micro_batch(lr)
            bad_samples += batch.sample_ids[i : i + micro][bad.cpu()].tolist()
            told.add({"loss": loss.detach(), **terms})
        return told, outcome, bad_samples

    def _account(
        self, outcome: UpdateResult, batch: Batch, replaced: float, bad: float, bad_samples: list[int]
    ) -> None:
        """Count and name samples that were replaced and steps that were skipped; the same decisions on every rank."""
        self.replaced += int(replaced)
        if replaced:
            told = [
                f"{asked} -> {given} ({reason})"
                for rank in self.ranks.all_gather(batch.replaced)
                for asked, given, reason in rank
            ]
            if self.ranks.is_first:
                self.metrics.event(self.step, "replaced", samples=told)
        self.bad_in_a_row = 0 if outcome.applied else self.bad_in_a_row + 1
        if outcome.applied:
            return
        self.skipped += 1
        suspects = (
            bad_samples if bad else batch.sample_ids.tolist()
        )  # a finite loss with such a gradient: any of the batch
        found = self.ranks.all_gather([self.dataset.name(i) for i in suspects])
        if self.ranks.is_first:
            kind = "non-finite loss, step skipped" if bad else "non-finite gradient, step skipped"
            self.metrics.event(
                self.step,
                kind,
                ranks=[r for r, s in enumerate(found) if s],
                samples=[s for rank in found for s in rank],
            )

    def _save(self) -> None:
        weights, moments, updates = self.engine.full_state()
        state = {
            "step": self.step,
            "samples": self.step * self.config.train.batch_size,
            "updates": updates,
            "seed": self.config.seed,
            "bad_in_a_row": self.bad_in_a_row,
            "skipped": self.skipped,
            "replaced": self.replaced,
            "method": self.distillation.state,
            "data_fingerprint": self.dataset.fingerprint,
            "world_size": self.ranks.world_size,
        }
        self.ranks.run_on_first(lambda: self.checkpoints.save(self.step, weights, moments, state))

    def _end(self, kind: Callable[[], str], reason: str, interruption: Interruption) -> None:
        """Note on the first rank how this start ended; RunError when the run must not be started again though it is not complete."""
        self.watchdog.at(self.step, "checkpoint")
        refused = self.ranks.run_on_first(lambda: self._note_end(kind(), reason))
        if self.ranks.is_first:  # whose probe and trackers the other ranks need not wait for
            self.probe.finish(
                self.step == self.config.train.steps, interruption, lambda: self.watchdog.at(self.step, "checkpoint")
            )
        if refused:
            raise RunError(f"'{self.folder.path}': {refused}")

    def _note_end(self, kind: str, reason: str) -> str | None:
        self.checkpoints.wait()
        run = self.folder.path
        history.record_end(run, kind, reason, self.step)
        refused = history.why_not_restart(run, self.config.resume)
        self.metrics.print(
            f"{run}: {reason}" + ("" if refused or kind == history.COMPLETE else "; start it again to go on")
        )
        return refused
