"""The training loop: shards in, a robust student out, every interruption survived."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..attacks.batching import out_of_memory
from ..config import Config
from ..data.dataset import open_dataset_on_all_ranks
from ..data.samples import Batch
from ..distributed import ranks as process_group
from ..distributed.interruption import EXIT_REQUEUE, Interruption
from ..distributed.ranks import Ranks
from ..errors import RunError, UserError
from ..runs import folder as run_folder, history, trackers
from ..runs.checkpoint_writer import Checkpoints
from ..runs.metrics import MetricLogger, SilentLogger
from . import probe
from .memory import what_to_lower
from .numerics import numerics
from .optimizer import learning_rate
from .overfitting_alarm import OverfittingAlarm
from .record import StepRecord
from .setup import TrainingParts, build_training
from .step import StepOutcome, optimizer_step
from .watchdog import Watchdog


def train(config: Config, interruption: Interruption) -> int:
    """Train or go on training the run of `config`; 0 when it is complete, EXIT_REQUEUE when it was asked to stop.

    A set `interruption` is acted on after the step under way, so that every start makes progress. Collective over the
    ranks of this launch. Raises UserError for what the user can mend, RunError for what ended the run.
    """
    with numerics(config.engine):
        ranks = process_group.start(config.engine.device, watchdog_minutes=config.resume.watchdog_minutes)
        with Watchdog(config, ranks) as watchdog:
            status = Trainer(config, ranks, watchdog).train(interruption)
        process_group.stop(ranks)
    return status


class Trainer:
    """A run that is opened: its data, its folder, and the step it goes on from."""

    parts: TrainingParts  # made by `build`, for a run that has steps left
    record: StepRecord
    alarm: OverfittingAlarm

    def __init__(self, config: Config, ranks: Ranks, watchdog: Watchdog):
        self.config, self.ranks, self.watchdog = config, ranks, watchdog
        torch.manual_seed(config.seed)
        self.dataset = open_dataset_on_all_ranks(config.data, ranks)
        self.probed_data = ranks.run_on_first(lambda: probe.check(config))
        self.folder = run_folder.prepare(config, self.dataset.fingerprint, ranks)
        self.step = self.folder.step
        watchdog.at(self.step, "set-up")
        self.checkpoints = Checkpoints(self.folder.path, config.checkpoint.keep_last, config.checkpoint.keep_every)
        self.logger = SilentLogger()
        self.probe = probe.SilentProbe()
        ranks.run_on_first(self._open_records)

    def _open_records(self) -> None:
        config, run = self.config, self.folder.path
        self.checkpoints.clean()
        opened = trackers.chosen(config, self.step)
        self.logger = MetricLogger(run, self.step, config.train.steps, config.log.every, opened)
        self.probe = probe.Probe(config, self.checkpoints, self.logger, self.step, self.probed_data)

    def train(self, interruption: Interruption) -> int:
        """Run to the last step or to an interruption; the exit status."""
        try:
            if self.step < self.config.train.steps:
                self._build()
                if not self._loop(interruption):
                    reason = f"stopped by {interruption.name} after step {self.step}"
                    self._finish(lambda: history.kind_of_stop(interruption.signal), reason, interruption)
                    return EXIT_REQUEUE
            self._finish(lambda: history.COMPLETE, f"complete, {self.step} steps done", interruption)
            return 0
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            reason = " ".join(str(error).split())[:200]
            lower = what_to_lower(self.config, self.ranks.world_size)
            raise RunError(
                f"step {self.step + 1}: {self.ranks.device} has too little memory; {lower} ({reason})"
            ) from None
        finally:
            self.logger.close()

    def _build(self) -> None:
        self.parts = build_training(self.config, self.dataset, self.folder, self.ranks, self.logger)
        engine, task = self.parts.engine, self.parts.task
        self.alarm = OverfittingAlarm(self.config, task, self.ranks, engine.micro_batch_size, self.logger)
        self.record = StepRecord(self.dataset, self.ranks, self.logger, self.config.train.batch_size, self.folder.state)

    def _loop(self, interruption: Interruption) -> bool:
        """Run the remaining steps. True: the run is complete. False: it was asked to stop, and its state is saved."""
        train = self.config.train
        self.logger.begin(self.parts.cost)
        self.watchdog.at(self.step + 1, "data")
        # With their labels, or with the captions of each global batch as its classes.
        for batch in self.parts.class_targets(self.parts.stream):
            self.watchdog.at(self.step + 1, "update")
            lr = learning_rate(self.step, train)
            self.parts.task.begin_step(self.step)
            done = self._optimizer_step(batch, lr)
            self.step += 1

            # After the agreement, every rank knows the same numbers.
            self.watchdog.at(self.step, "agreement")
            stop = bool(interruption) or self._failure() is not None
            agreed = self.record.agree(done, batch, stop)
            if agreed.update.applied:
                self.parts.task.end_step(agreed.means | agreed.quantiles)
            self.record.report(self.step, agreed, done, batch)
            self.logger.step(self.step, agreed, agreed.update, lr)
            self.probe.after_step(self.step)
            self.alarm.after_step(self.step, batch)
            self.record.raise_if_never_finite(self.step, train.max_bad_steps)

            if agreed.stop or self.step == train.steps or self.step % self.config.checkpoint.every == 0:
                self.watchdog.at(self.step, "checkpoint")
                self.record.raise_if_ruined(self.step, agreed)
                self._save_checkpoint()
            if agreed.stop and self.step < train.steps:
                return False
            self.watchdog.at(self.step + 1, "data")
        return True

    def _optimizer_step(self, batch: Batch, lr: float) -> StepOutcome:
        done = optimizer_step(self.parts.task, self.parts.engine, batch, lr, self.ranks.device)
        share, world = lr / self.config.train.lr, self.ranks.world_size
        self.parts.task.learned.update(self.step, done.update.applied, share, process_group.reduce, world)
        return done

    def _failure(self) -> UserError | None:
        """What the first rank could not write, such as on a full disk; the others hear of it where they agree."""
        return self.logger.failure or self.checkpoints.failure

    def _save_checkpoint(self) -> None:
        self.ranks.raise_together(self._failure())
        weights, moments, updates = self.parts.engine.full_state()
        if self.ranks.is_first:
            moments |= self.parts.task.learned.tensors()
        state = {
            "step": self.step,
            "samples": self.step * self.config.train.batch_size,
            "updates": updates,
            "seed": self.config.seed,
            **self.record.state(),
            "method": self.parts.task.state,
            "fell_back": self.parts.task.fell_back,
            "data_fingerprint": self.dataset.fingerprint,
            run_folder.TEACHERS: self.parts.teachers_sha256,
            "world_size": self.ranks.world_size,
        }
        sync = self.logger.sync  # the rows of the steps before are as safe as the checkpoint
        self.ranks.run_on_first(lambda: self.checkpoints.save(self.step, weights, moments, state, sync))

    def _finish(self, kind: Callable[[], str], reason: str, interruption: Interruption) -> None:
        """Note how this start ended. RunError when the run must not be started again though it is not complete.

        The other ranks do not wait for the first one's probe and trackers.
        """
        self.watchdog.at(self.step, "checkpoint")
        self.ranks.raise_together(self._failure())
        refused = self.ranks.run_on_first(lambda: self._note_end(kind(), reason))
        complete = self.step == self.config.train.steps
        self.probe.finish(complete, interruption, lambda: self.watchdog.at(self.step, "checkpoint"))
        if refused:
            raise RunError(f"'{self.folder.path}': {refused}")

    def _note_end(self, kind: str, reason: str) -> str | None:
        self.checkpoints.wait()
        run = self.folder.path
        history.record_end(run, kind, reason, self.step)
        refused = history.why_not_restart(run, self.config.resume)
        advice = "" if refused or kind == history.COMPLETE else "; start it again to go on"
        self.logger.print(f"{run}: {reason}{advice}")
        return refused
