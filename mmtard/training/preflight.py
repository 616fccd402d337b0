"""Before hours are spent: whether these ranks, this data and this folder can carry the run. A PASS or FAIL line for
each check.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

import torch

from ..config import Config, Model
from ..data.class_names import classnames, templates
from ..data.dataset import open_dataset_on_all_ranks
from ..data.stream import train_stream
from ..distributed.ranks import Ranks, peer_is_gone, process_group, reduce
from ..embeddings import identity
from ..errors import UserError
from ..models import loading
from ..models.image_tower import DTYPES
from ..runs.environment import PACKAGES
from . import probe

FREE_SHARE = 0.9  # of a GPU's memory: less free, and somebody else is on it
REDUCED_MIB, REDUCED_TIMES = 64, 5
READ_S, READ_BATCHES = 10.0, 30
BYTES_A_WEIGHT, BYTES_OF_EMA = (
    12,
    4,
)  # in a checkpoint: float32 and the two moments of AdamW; a moving average beside them


class CheckFailed(Exception):
    """What a check found wrong."""


def preflight(config: Config) -> int:
    """Run every check on the ranks of this launch, one after another; 1 when any failed on any rank, else 0."""
    with process_group(config.engine.device) as ranks:
        checks = Checks(config, ranks)
        embeddings = ["embeddings"] if any(teacher.stored for teacher in config.teachers.values()) else []
        passed = [
            checks.run(name) for name in ("versions", "devices", "network", "models", *embeddings, "folder", "shards")
        ]
    return 0 if all(passed) else 1


class Checks:
    """Each check has a part that every rank does, which may fail on some of them only, and a verdict on what they all
    found.
    """

    def __init__(self, config: Config, ranks: Ranks):
        self.config, self.ranks = config, ranks
        self.image_size, self.parameters = 224, 0
        self.most_images_per_s = 0.0

    def run(self, name: str) -> bool:
        """Do a check, print its line on the first rank; the same answer on every rank."""
        fault = found = None
        try:
            found = getattr(self, name)()
        except (CheckFailed, UserError, OSError) as error:
            fault = str(error)
        except RuntimeError as error:
            if peer_is_gone(error):
                raise
            fault = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"  # such as a GPU's own errors
        answers = self.ranks.all_gather((platform.node(), found, fault))
        where: dict[str, list[str]] = {}
        for rank, (node, _, what) in enumerate(answers):
            if what:
                where.setdefault(what, []).append(f"rank {rank} ({node})")
        told = "; ".join(f"{', '.join(ranks)}: {what}" for what, ranks in where.items())
        if not where:
            try:
                told = getattr(self, f"{name}_verdict")([found for _, found, _ in answers])
            except CheckFailed as error:
                where, told = {"all": []}, str(error)
        if self.ranks.is_first:
            print(f"{'FAIL' if where else 'PASS'} {name}: {told}", flush=True)
        return not where

    # ---------------------------------------------------------------- the same Python and packages everywhere

    def versions(self) -> dict:
        return {"python": platform.python_version(), "cuda": torch.version.cuda} | {
            name: version(name) for name in PACKAGES
        }

    def versions_verdict(self, found: list[dict]) -> str:
        first = found[0]
        other = {
            f"{k} is {own[k]} on rank {r} and {first[k]} on rank 0"
            for r, own in enumerate(found)
            for k in own
            if own[k] != first[k]
        }
        if other:
            raise CheckFailed(f"{'; '.join(sorted(other)[:4])}; use one environment on all nodes")
        return f"python {first['python']}, torch {first['torch']}, deepspeed {first['deepspeed']}, the same on {len(found)} ranks"

    # ---------------------------------------------------------------- each GPU computes rightly and is free

    def devices(self) -> str:
        """What this rank computes on; Fault when its GPU is taken, faulty or wrong."""
        device = self.ranks.device
        if device.type == "cpu":
            return f"CPU, {torch.get_num_threads()} threads a rank ({'as asked for' if self.config.engine.device == 'cpu' else 'no GPU here'})"
        free, total = torch.cuda.mem_get_info(device)
        if free < FREE_SHARE * total:
            raise CheckFailed(
                f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB of {device} are free, another program is on it (nvidia-smi names it)"
            )
        a, b = (
            torch.randint(-8, 8, (2048, 2048), generator=torch.Generator().manual_seed(seed)).float() for seed in (0, 1)
        )
        if not torch.equal(
            (a.to(device) @ b.to(device)).cpu(), a @ b
        ):  # whole numbers this small are exact in any order
            raise CheckFailed(f"a product of whole numbers came out wrong on {device}; have the node checked")
        errors = _memory_errors(torch.cuda.get_device_properties(device).uuid)
        if errors:
            raise CheckFailed(
                f"{device} had {errors} uncorrected memory errors since the node started; have the node checked"
            )
        return f"{torch.cuda.get_device_name(device)}, {free / 2**30:.0f} GiB free"

    def devices_verdict(self, found: list[str]) -> str:
        return "; ".join(f"{found.count(what)} x {what}" for what in dict.fromkeys(found))

    # ---------------------------------------------------------------- every rank reaches the others, and how fast

    def network(self) -> tuple[bool, float]:
        numbers = torch.ones(REDUCED_MIB * 2**18, device=self.ranks.device)
        reduce(numbers)
        right = bool((numbers == self.ranks.world_size).all())
        self.ranks.barrier()
        began = time.monotonic()
        for _ in range(REDUCED_TIMES):
            reduce(numbers)
        numbers[0].item()  # waits for the GPU
        return right, (time.monotonic() - began) / REDUCED_TIMES

    def network_verdict(self, found: list[tuple[bool, float]]) -> str:
        world = len(found)
        wrong = [r for r, (right, _) in enumerate(found) if not right]
        if wrong:
            raise CheckFailed(f"a sum over {world} ranks came out wrong on ranks {wrong}; have the network checked")
        if world == 1:
            return "one rank, none to reach"
        rate = REDUCED_MIB / 1024 / max(seconds for _, seconds in found) * 2 * (world - 1) / world
        return f"{world} ranks reach each other, all-reduce of {REDUCED_MIB} MiB at {rate:.3g} GiB/s of bus bandwidth"

    # ---------------------------------------------------------------- student and teachers load, and what their
    # passes allow

    def models(self) -> float:
        config = self.config
        share = config.train.batch_size // self.ranks.world_size
        micro = min(config.train.micro_batch_size or share, share)
        attacked = config.attack_objective is not None
        seconds = self._pass(config.student, "student", micro, attacked) * (config.attack.steps + 1 if attacked else 1)
        # The untouched student is the student itself here: the run has not stored it yet.
        return micro / (
            seconds
            + sum(
                self._pass(config.model_of(name), f"teachers.{name}", micro, False)
                for name, t in config.ensemble.items()
                if not t.stored
            )
        )

    def _pass(self, spec: Model, where: str, micro: int, attacked: bool) -> float:
        """Seconds of a model's forward, and of the gradient for the images when it is attacked."""
        tower, dtype = loading.load_clip(spec, self.config.seed, where).tower(), DTYPES[self.config.engine.precision]
        if where == "student":
            self.image_size, self.parameters = tower.image_size, sum(p.numel() for p in tower.parameters())
            tower.autocast = dtype if dtype != torch.float32 else None
        else:
            tower.cast(dtype)
        tower.to(self.ranks.device).eval().requires_grad_(False)
        images = torch.rand(micro, 3, self.image_size, self.image_size, device=self.ranks.device)
        for _ in range(2):  # the first also sets the device up
            began = time.monotonic()
            x = images.clone().requires_grad_(attacked)
            z = tower(x)
            if attacked:
                torch.autograd.grad(z.sum(), x)
            if not bool(torch.isfinite(z).all()):
                raise CheckFailed(f"{where}: the embeddings of '{spec.weights}' are not finite; give other weights")
            seconds = time.monotonic() - began
        return seconds

    def models_verdict(self, found: list[float]) -> str:
        self.most_images_per_s = sum(found)
        names = [name for name, teacher in self.config.ensemble.items() if not teacher.stored]
        return f"{', '.join(['student', *names])} load; their passes alone allow {sum(found):.4g} images/s at most"

    # ---------------------------------------------------------------- stored embeddings are those of the teachers and
    # the shards

    def embeddings(self) -> dict[str, Path]:
        config = self.config
        dataset = open_dataset_on_all_ranks(config.data, self.ranks)
        clips = {
            name: identity.load_teacher_clip(config, name)
            for name, teacher in config.teachers.items()
            if teacher.stored
        }
        found = identity.open_stores(config, clips, self.image_size, dataset.fingerprint, self.ranks)
        return {name: embeddings.folder for name, embeddings in found.items()}

    def embeddings_verdict(self, found: list[dict[str, Path]]) -> str:
        return "; ".join(
            f"those of teacher {name} are stored in {folder} and match" for name, folder in found[0].items()
        )

    # ---------------------------------------------------------------- the run's folder is shared, writable, and large
    # enough

    def folder(self) -> int:
        """Bytes free in the run folder; Fault when it cannot be written or the nodes do not share it."""
        run, fault = Path(self.config.run_dir), None
        mark = run / f".preflight-{self.ranks.rank}"
        try:
            run.mkdir(parents=True, exist_ok=True)
            mark.touch()
        except OSError as error:
            fault = f"cannot write to '{run}' ({error.strerror}); choose another run_dir"
        self.ranks.barrier()
        seen = len(list(run.glob(".preflight-*"))) if not fault else 0
        self.ranks.barrier()
        if fault:
            raise CheckFailed(fault)
        mark.unlink()
        if seen != self.ranks.world_size:
            raise CheckFailed(
                f"'{run}' shows the files of {seen} of {self.ranks.world_size} ranks, so the nodes do not share it; choose a shared run_dir"
            )
        return shutil.disk_usage(run).free

    def folder_verdict(self, found: list[int]) -> str:
        run, keep = self.config.run_dir, self.config.checkpoint
        count = keep.keep_last + 1 + (self.config.train.steps // keep.keep_every if keep.keep_every else 0)
        need = count * (BYTES_A_WEIGHT + (BYTES_OF_EMA if self.config.train.ema else 0)) * self.parameters
        if need > min(found):
            raise CheckFailed(
                f"{count} checkpoints take {need / 1e9:.3g} GB and '{run}' has {min(found) / 1e9:.3g} GB left; free space or keep fewer"
            )
        return f"{len(found)} ranks write to {run}; {count} checkpoints take {need / 1e9:.3g} of {min(found) / 1e9:.4g} GB left (quotas do not show)"

    # ---------------------------------------------------------------- the loaders, all at once, give images fast enough

    def shards(self) -> tuple[int, int, float]:
        """(samples, shards, images a second that this rank's loaders give), measured after the first batch."""
        config, ranks = self.config, self.ranks
        dataset = open_dataset_on_all_ranks(config.data, ranks)
        ranks.run_on_first(lambda: probe.check(config))
        if config.data.targets == "labels":
            classnames(config.data, dataset)
            templates(config.data)
        stream = train_stream(config, dataset, ranks, self.image_size, stop=READ_BATCHES + 1)
        images, began = 0, None
        for batch in stream:
            if began is None:  # the first batch waits for the workers to start
                began = time.monotonic()
                continue
            images += len(batch)
            if time.monotonic() - began > READ_S:
                break
        return len(dataset), len(dataset.paths), images / max(time.monotonic() - began, 1e-9)

    def shards_verdict(self, found: list[tuple[int, int, float]]) -> str:
        samples, count, _ = found[0]
        rate = min(rate for _, _, rate in found) * len(found)  # the slowest rank sets the pace
        told = f"{samples} samples in {count} shards, read at {rate:.4g} images/s"
        if rate < self.most_images_per_s:
            workers = f"data.workers (now {self.config.data.workers}; {os.cpu_count()} cores here)"
            raise CheckFailed(
                f"{told}; the models may take {self.most_images_per_s:.4g}: raise {workers}, or write smaller images with `mmtard shards --resize`"
            )
        return told


def _memory_errors(uuid) -> int:
    ask = [
        "nvidia-smi",
        f"--id=GPU-{uuid}",
        "--query-gpu=ecc.errors.uncorrected.volatile.total",
        "--format=csv,noheader",
    ]
    try:
        told = subprocess.run(ask, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return int(told) if told.isdigit() else 0  # "[N/A]" for a GPU that does not count them
