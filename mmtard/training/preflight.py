"""Before hours are spent: whether these ranks, this data and this folder can carry the run.

Each check prints a PASS or FAIL line.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import torch

from ..config import Config, Model
from ..data.class_names import classnames, templates
from ..data.dataset import open_dataset_on_all_ranks
from ..data.images import Transform
from ..data.stream import train_stream
from ..distributed.ranks import process_group
from ..embeddings import identity
from ..models import loading
from ..models.image_tower import DTYPES
from . import probe
from .machine_checks import Devices, Limits, Network, Versions
from .preflight_check import Bench, Check, CheckFailed

READ_S, READ_BATCHES = 10.0, 30
BYTES_A_WEIGHT = 12  # in a checkpoint: float32 and the two moments of AdamW
BYTES_OF_EMA = 4  # of a moving average beside them


def preflight(config: Config) -> int:
    """Run every check on the ranks of this launch, one after another; 1 when any failed on any rank, else 0."""
    with process_group(config.engine.device) as ranks:
        bench = Bench(config, ranks)
        passed = [bench.run(check) for check in CHECKS if check.applies(config)]
    return 0 if all(passed) else 1


class Models(Check):
    """Student and teachers load, and what their passes allow."""

    name = "models"

    def measure(self, bench: Bench) -> float:
        """Images a second that this rank's passes allow, attack included."""
        config = bench.config
        share = config.train.batch_size // bench.ranks.world_size
        micro = min(config.train.micro_batch_size or share, share)
        attacked = config.attack_objective is not None
        passes = config.attack.steps + 1 if attacked else 1
        seconds = passes * self._pass(bench, config.student, "student", micro, attacked)
        for name, teacher in config.ensemble.items():
            if not teacher.stored:
                # The untouched student is the student itself here: the run has not stored it yet.
                seconds += self._pass(bench, config.model_of(name), f"teachers.{name}", micro, False)
        return micro / seconds

    def _pass(self, bench: Bench, spec: Model, where: str, micro: int, attacked: bool) -> float:
        """Seconds of a model's forward, and of the gradient for the images when it is attacked."""
        config, device = bench.config, bench.ranks.device
        tower, dtype = loading.load_clip(spec, config.seed, where).tower(), DTYPES[config.engine.precision]
        if where == "student":
            bench.image_size, bench.parameters = tower.image_size, sum(p.numel() for p in tower.parameters())
            tower.autocast = dtype if dtype != torch.float32 else None
        else:
            tower.cast(dtype)
        tower.to(device).eval().requires_grad_(False)
        images = torch.rand(micro, 3, *Transform(bench.image_size).shape, device=device)
        for _ in range(2):  # the first pass also sets the device up
            began = time.monotonic()
            x = images.clone().requires_grad_(attacked)
            z = tower(x)
            if attacked:
                torch.autograd.grad(z.sum(), x)
            if not bool(torch.isfinite(z).all()):
                raise CheckFailed(f"{where}: the embeddings of '{spec.weights}' are not finite; give other weights")
            seconds = time.monotonic() - began
        return seconds

    def verdict(self, bench: Bench, found: list[float]) -> str:
        """The models, and how many images a second their passes allow."""
        bench.most_images_per_s = sum(found)
        names = [name for name, teacher in bench.config.ensemble.items() if not teacher.stored]
        return f"{', '.join(['student', *names])} load; their passes alone allow {sum(found):.4g} images/s at most"


class StoredEmbeddings(Check):
    """Stored embeddings are those of the teachers and the shards."""

    name = "embeddings"

    def applies(self, config: Config) -> bool:
        """Whether any teacher's embeddings are read."""
        return any(teacher.stored for teacher in config.teachers.values())

    def measure(self, bench: Bench) -> dict[str, Path]:
        """Teacher -> the folder of its stored embeddings."""
        config, ranks = bench.config, bench.ranks
        dataset = open_dataset_on_all_ranks(config.data, ranks)
        stored = [name for name, teacher in config.teachers.items() if teacher.stored]
        clips = {name: identity.load_teacher_clip(config, name, ranks) for name in stored}
        stores = identity.open_stores(config, clips, bench.image_size, dataset.fingerprint, ranks)
        return {name: store.folder for name, store in stores.items()}

    def verdict(self, bench: Bench, found: list[dict[str, Path]]) -> str:
        """Where the embeddings are stored that match."""
        return "; ".join(
            f"those of teacher {name} are stored in {folder} and match" for name, folder in found[0].items()
        )


class Folder(Check):
    """The run's folder is shared, writable, and large enough."""

    name = "folder"

    def measure(self, bench: Bench) -> int:
        """Bytes free in the run folder; CheckFailed when it cannot be written or the nodes do not share it."""
        run, failure = Path(bench.config.run_dir), None
        ranks = bench.ranks
        mark = run / f".preflight-{ranks.rank}"
        try:
            run.mkdir(parents=True, exist_ok=True)
            mark.touch()
        except OSError as error:
            failure = f"cannot write to '{run}' ({error.strerror}); choose another run_dir"
        ranks.barrier()
        seen = len(list(run.glob(".preflight-*"))) if not failure else 0
        ranks.barrier()
        if failure:
            raise CheckFailed(failure)
        mark.unlink()
        if seen != ranks.world_size:
            raise CheckFailed(
                f"'{run}' shows the files of {seen} of {ranks.world_size} ranks, so the nodes do not share it; "
                "choose a shared run_dir"
            )
        return shutil.disk_usage(run).free

    def verdict(self, bench: Bench, found: list[int]) -> str:
        """The room on the disk beside what the checkpoints take."""
        config, free = bench.config, min(found)
        keep, run = config.checkpoint, config.run_dir
        count = keep.keep_last + 1 + (config.train.steps // keep.keep_every if keep.keep_every else 0)
        need = count * (BYTES_A_WEIGHT + (BYTES_OF_EMA if config.train.ema else 0)) * bench.parameters
        if need > free:
            raise CheckFailed(
                f"{count} checkpoints take {need / 1e9:.3g} GB and '{run}' has {free / 1e9:.3g} GB left; "
                "free space or keep fewer"
            )
        room = f"{count} checkpoints take {need / 1e9:.3g} of {free / 1e9:.4g} GB left (quotas do not show)"
        return f"{len(found)} ranks write to {run}; {room}"


class Shards(Check):
    """The loaders, all at once, give images fast enough."""

    name = "shards"

    def measure(self, bench: Bench) -> tuple[int, int, float]:
        """(samples, shards, images a second that this rank's loaders give), measured after the first batch."""
        config, ranks = bench.config, bench.ranks
        dataset = open_dataset_on_all_ranks(config.data, ranks)
        ranks.run_on_first(lambda: probe.check(config))
        if config.data.targets == "labels":
            classnames(config.data, dataset)
            templates(config.data)
        stream = train_stream(config, dataset, ranks, bench.image_size, stop=READ_BATCHES + 1)
        images, began = 0, None
        for batch in stream:
            if began is None:  # the first batch waits for the workers to start
                began = time.monotonic()
                continue
            images += len(batch)
            if time.monotonic() - began > READ_S:
                break
        return len(dataset), len(dataset.paths), images / max(time.monotonic() - began, 1e-9)

    def verdict(self, bench: Bench, found: list[tuple[int, int, float]]) -> str:
        """How fast the shards are read beside what the models take."""
        samples, count, _ = found[0]
        rate = min(rate for _, _, rate in found) * len(found)  # the slowest rank sets the pace
        line = f"{samples} samples in {count} shards, read at {rate:.4g} images/s"
        if rate < bench.most_images_per_s:
            workers = f"data.workers (now {bench.config.data.workers}; {os.cpu_count()} cores here)"
            raise CheckFailed(
                f"{line}; the models may take {bench.most_images_per_s:.4g}: raise {workers}, "
                "or write smaller images with `mmtard shards --resize`"
            )
        return line


CHECKS = (Versions(), Devices(), Network(), Models(), StoredEmbeddings(), Folder(), Limits(), Shards())
