"""`mmtard cache`: embed each image once with the teachers that only see clean images, and store that for training."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from ..config import UNSTORABLE, Config, check_world
from ..data.dataset import Dataset, open_dataset_on_all_ranks
from ..data.images import Transform
from ..data.samples import Batch, SampleReader
from ..data.staging import staging_for
from ..data.stream import eval_batches
from ..distributed.console import say
from ..distributed.interruption import Interruption
from ..distributed.ranks import Ranks, process_group
from ..errors import RunError, UserError
from ..files import settings_digest
from ..models import loading
from ..models.image_tower import DTYPES, freeze, why_no_embeddings
from ..models.precision import full_float32
from . import identity
from .settings import embedding_recipe, embeddings_folder, read_manifest
from .store import PartLayout, finish, missing_parts, write_part

SAY_EVERY_S = 10.0


def cache(config: Config, interruption: Interruption, say=say) -> None:
    """Store the embeddings of the configuration's teachers that only see clean images, where they are not stored yet.

    The ranks of this launch share the work. Raises UserError for what the user can mend, and RunError of status
    `EXIT_REQUEUE` on every rank when any was interrupted: the next start goes on from the parts that are stored.
    """
    exact = full_float32() if config.engine.precision == "float32" else nullcontext()
    with exact, process_group(config.engine.device) as ranks:
        names = identity.cacheable_teachers(config)
        if not names:
            raise UserError(
                f"method.name: every teacher of '{config.method.name}' sees adversarial images, or it has none;"
                " nothing can be stored for it"
            )
        if config.data.augmented and config.data.views is None:
            raise UserError(f"data.views: {UNSTORABLE}")
        dataset = open_dataset_on_all_ranks(config.data, ranks)
        student = loading.load_clip_on_all_ranks(config.student, ranks, config.seed, "student")
        image_size = student.tower().image_size
        for name in names:
            _Storing(config, name, dataset, image_size, ranks, say if ranks.is_first else _silent).run(interruption)


@dataclass(frozen=True)
class _Plan:
    """The images that this rank embeds: samples and views int64 [n], whole batches for each part in turn."""

    samples: np.ndarray
    views: np.ndarray
    batches: list[tuple[int, int]]  # (part, how many)


class _Storing:
    """The embeddings of one teacher on their way to disk."""

    def __init__(
        self, config: Config, name: str, dataset: Dataset, image_size: int | tuple[int, int], ranks: Ranks, say
    ):
        self.config, self.name, self.dataset, self.ranks, self.say = config, name, dataset, ranks, say
        self.image_size = image_size
        self.layout = PartLayout(len(dataset), config.data.views or 1)
        # Of the training's size: a matrix product of another shape may differ in its last bits.
        self.batch = config.train.batch_size // ranks.world_size // check_world(config, ranks.world_size)
        self.clip = identity.load_teacher_clip(config, name, ranks)
        self.identity = ranks.run_on_first(
            lambda: identity.embedding_identity(config, self.clip, image_size, dataset.fingerprint)
        )
        self.folder = embeddings_folder(config.data) / settings_digest(self.identity)

    def run(self, interruption: Interruption) -> None:
        """Store what is missing. Collective. Raises RunError when it was asked to stop; what is stored is kept."""
        ranks, parts = self.ranks, self.layout.parts
        ranks.run_on_first(self._make_folder)
        own = missing_parts(self.folder, self.layout, range(ranks.rank, parts, ranks.world_size))
        missing = sorted(number for numbers in ranks.all_gather(own) for number in numbers)
        if not missing and ranks.run_on_first(lambda: read_manifest(self.folder) is not None):
            self.say(
                f"teacher {self.name}: all of its {len(self.dataset)} x {self.layout.views} embeddings are stored in"
                f" {self.folder}, nothing to do"
            )
            return
        if missing:
            self.say(
                f"teacher {self.name}: {len(missing)} of {parts} parts are to be stored in {self.folder},"
                f" {self.batch} images at a time on each of {ranks.world_size} ranks"
            )
            self._store(missing, interruption)
        ranks.barrier()
        ranks.run_on_first(self._finish)
        also = "" if self.config.ensemble[self.name].stored else f"; train with teachers.{self.name}.stored=true"
        self.say(
            f"teacher {self.name}: {len(self.dataset)} x {self.layout.views} embeddings are stored in"
            f" {self.folder}{also}"
        )

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._cannot_write(error, "set it to a folder that every node can write to") from None

    def _cannot_write(self, error: OSError, remedy: str) -> UserError:
        return UserError(f"data.embeddings: cannot write to '{self.folder}': {error.strerror}; {remedy}")

    def _finish(self) -> None:
        origin = {
            "teacher": self.name,
            "made_from": embedding_recipe(self.config, self.name),
            "images_at_once": self.batch,
            "device": torch.cuda.get_device_name() if self.ranks.device.type == "cuda" else "cpu",
            "torch": torch.__version__,
        }
        try:
            finish(self.folder, self.layout, self.identity, origin)
        except OSError as error:
            raise self._cannot_write(error, "free space there, then start again to go on") from None
        for left in self.folder.glob(".*.part"):  # of a start that was killed
            left.unlink(missing_ok=True)

    def _store(self, missing: list[int], interruption: Interruption) -> None:
        """Ask the teacher for this rank's share of the missing parts.

        All ranks take a batch, or none, at the same time.
        """
        ranks = self.ranks
        plan = self._plan(missing[ranks.rank :: ranks.world_size])
        rounds = max(ranks.all_gather(len(plan.samples) // self.batch))
        to_do, *_ = ranks.sum([len(plan.samples)])
        done, began, said, published = 0.0, time.monotonic(), time.monotonic(), 0
        work, failure = self._parts(plan), None
        for _ in range(rounds):
            asked = finished = 0
            try:
                asked, finished = next(work, (0, 0))
            except (UserError, RunError) as error:
                failure = error
            published += finished
            news, stop, parts, failed = ranks.sum([asked, bool(interruption), published, failure is not None])
            if failed:
                ranks.raise_together(failure)
            done += news
            now = time.monotonic()
            if now - said > SAY_EVERY_S:
                said, rate = now, done / (now - began)
                self.say(
                    f"teacher {self.name}: {parts:.0f} of {len(missing)} parts, {rate:.4g} images/s,"
                    f" {_duration((to_do - done) / rate)} left"
                )
            if stop and parts < len(missing):
                raise self._stopped(interruption, int(parts), len(missing))

    def _stopped(self, interruption: Interruption, parts: int, missing: int) -> RunError:
        """The end of an interrupted start that stored `parts` of the `missing` ones."""
        reason = f"stopped by {interruption.name}; {parts} of {missing} missing parts of teacher {self.name} are stored"
        if parts:
            return RunError(f"{reason}, start it again to go on", interruption.exit_status(self.ranks))
        # Parts that never get done between two interruptions would have the job start again for ever.
        return RunError(f"{reason} in this start; give it more time", 1)

    def _plan(self, parts: list[int]) -> _Plan:
        samples, views, batches = [], [], []
        for number in parts:
            ids = np.asarray(self.layout.part(number), dtype=np.int64)
            rows = len(ids) * self.layout.views
            padded = np.arange(-(-rows // self.batch) * self.batch) % rows  # the last batch repeats the first rows
            samples.append(ids[padded // self.layout.views])
            views.append(padded % self.layout.views)
            batches.append((number, len(padded) // self.batch))
        none = np.empty(0, dtype=np.int64)
        return _Plan(np.concatenate([none, *samples]), np.concatenate([none, *views]), batches)

    def _parts(self, plan: _Plan) -> Iterator[tuple[int, int]]:
        """Publish each part of the plan when its last batch is done.

        Yields after each batch how many images were embedded and how many parts published.
        """
        dtype = DTYPES[self.config.engine.precision]
        tower = freeze(self.clip.tower(), dtype, self.ranks.device)
        batches = self._batches(plan)
        for number, count in plan.batches:
            samples = self.layout.part(number)
            rows, given = [], []
            for left in reversed(range(count)):
                batch = next(batches)
                images = batch.pixels(self.ranks.device)
                with torch.no_grad():
                    rows.append(tower(images).to("cpu", dtype))  # float32, but each a number of this dtype
                given.append(batch.sample_ids)
                if left == 0:
                    self._publish(number, samples, torch.cat(rows), torch.cat(given))
                yield len(batch), int(left == 0)

    def _batches(self, plan: _Plan) -> Iterator[Batch]:
        config, settings = self.config, self.config.data
        samples = SampleReader(
            self.dataset,
            Transform(self.image_size, settings.resize, settings.crop_scale, settings.flip),
            seed=config.seed,
            need_labels=False,
            staging=staging_for(self.dataset, settings.cache),
        )
        return eval_batches(
            samples,
            plan.samples,
            self.batch,
            views=plan.views,
            workers=settings.workers,
            max_replaced=settings.max_replaced,
        )

    def _publish(self, number: int, samples: range, rows: torch.Tensor, given: torch.Tensor) -> None:
        views = self.layout.views
        embeddings, given = (x[: len(samples) * views].unflatten(0, (len(samples), views)) for x in (rows, given))
        readable = given[:, 0] == torch.arange(samples.start, samples.stop)
        sound = embeddings[readable].flatten(0, 1)
        reason = why_no_embeddings(sound, int(readable.sum())) if len(sound) else None
        if reason:
            raise UserError(f"teachers.{self.name}: its embeddings are {reason}; mend its weights")
        try:
            write_part(self.folder, number, embeddings, readable)
        except OSError as error:
            raise self._cannot_write(error, "free space there, then start again to go on") from None


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    if minutes > 90:
        return f"{minutes / 60:.1f} h"
    return f"{minutes:.0f} min" if minutes >= 2 else f"{seconds:.0f} s"


def _silent(*_) -> None:
    pass
