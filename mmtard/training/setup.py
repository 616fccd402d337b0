"""What a training needs before its first step: models, teachers, classes, data, engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from ..config import Config, Teacher
from ..data.class_names import classnames
from ..data.dataset import Dataset
from ..data.samples import Batch
from ..data.stream import TrainStream, train_stream
from ..distillation.added_terms import learned_parts
from ..distillation.learned import LearnedParts
from ..distillation.task import DistillationTask
from ..distributed.ranks import Ranks, set_timeouts
from ..embeddings.identity import open_stores
from ..embeddings.store import EmbeddingStore
from ..embeddings.teacher import StoredTeacher
from ..evaluation.data_checks import class_name_lines
from ..models.clip import Clip
from ..models.image_tower import DTYPES, require_places, require_tokens
from ..models.loading import load_clip_on_all_ranks
from ..models.student import start_model, trainable_tower
from ..models.teachers import FrozenTeacher, compile_teachers
from ..models.weights import tensors_sha256
from ..runs.checkpoints import read_optimizer
from ..runs.folder import RunFolder, note_teachers
from ..runs.metrics import SilentLogger
from ..zero_shot import ZeroShotHead
from .class_targets import build_class_targets
from .engine import Engine
from .throughput import cost, forward_flops_of, peak_flops, sample_flops
from .watchdog import group_timeout

Ensemble = dict[str, FrozenTeacher | StoredTeacher]


@dataclass(frozen=True)
class TrainingParts:
    """What the loop works with.

    class_targets: gives the batches their labels, or makes the captions of each the classes of its step.
    """

    stream: TrainStream
    class_targets: Callable[[Iterable[Batch]], Iterable[Batch]]
    engine: Engine
    task: DistillationTask
    cost: Callable[[float], dict[str, float]]  # seconds of a step -> its speed and memory
    teachers_sha256: dict[str, str]


def build_training(
    config: Config, dataset: Dataset, folder: RunFolder, ranks: Ranks, logger: SilentLogger
) -> TrainingParts:
    """Load and place all that the run trains with, and go on from its checkpoint where there is one. Collective."""
    start = start_model(config, folder.path, bool(folder.checkpoint), ranks)
    clips = {"student": start} | {
        name: load_clip_on_all_ranks(teacher, ranks, config.seed, f"teachers.{name}")
        for name, teacher in config.ensemble.items()
    }
    teachers_sha256 = ranks.run_on_first(lambda: _note_teachers(config, folder, clips))
    require = require_tokens if config.method.tokens else require_places
    for name in sorted(config.token_models):
        require(clips[name].tower(), name)
    heads, class_targets = build_class_targets(config, folder.path, clips, dataset, ranks, logger.print)
    tower = trainable_tower(config, start, folder.checkpoint)
    stores = open_stores(config, clips, tower.image_size, dataset.fingerprint, ranks)
    # Counted before the engine takes the student's weights.
    flops = forward_flops_of({name: clip for name, clip in clips.items() if name not in stores})
    flops |= dict.fromkeys(stores, 0.0)
    learned = learned_of(config, clips, ranks.device, len(dataset))
    engine = Engine(config, tower, ranks)
    engine.compile(config.engine.compile, logger.print)
    set_timeouts(group_timeout(config))  # of DeepSpeed's own process groups, too
    if folder.checkpoint:
        tensors = read_optimizer(folder.checkpoint)
        engine.restore(tensors, folder.updates)
        learned.restore(tensors)
    ensemble = build_teachers(config.ensemble, clips, heads, stores, ranks, DTYPES[config.engine.precision])
    compile_teachers(config.engine.compile, ensemble, ranks.device, logger.print)
    task = DistillationTask(config, engine, heads["student"], ensemble, learned)
    task.state |= folder.state.get("method", {})
    task.fell_back = folder.state.get("fell_back", False)
    log_start(config, folder, dataset, tower.image_size, heads["student"], ensemble, ranks, logger)
    return TrainingParts(
        train_stream(config, dataset, ranks, tower.image_size, start=folder.step, embeddings=stores),
        class_targets,
        engine,
        task,
        step_cost(config, ranks, task, flops),
        teachers_sha256,
    )


def _note_teachers(config: Config, folder: RunFolder, clips: dict[str, Clip]) -> dict[str, str]:
    """The hash of each teacher as it was loaded, before anything is sharded or cast, also of one that is stored."""
    found = {name: tensors_sha256(clips[name].model.state_dict()) for name in config.ensemble}
    note_teachers(folder, config, found)
    return found


def step_cost(
    config: Config, ranks: Ranks, task: DistillationTask, flops: dict[str, float]
) -> Callable[[float], dict[str, float]]:
    """Seconds of a step -> its speed and memory. flops: of a forward pass of one image, by model."""
    adapters, peak = bool(config.student.lora), peak_flops(ranks.device, config.engine.precision)
    return lambda seconds: cost(
        seconds,
        images=config.train.batch_size,
        # Of the step that is over: its attack may be weaker, or stronger, than the next one's.
        flops=sample_flops(flops, task.passes, task.objective, task.attack, adapters=adapters),
        peak=peak,
        world_size=ranks.world_size,
        device=ranks.device,
    )


def learned_of(config: Config, clips: dict[str, Clip], device: torch.device, samples: int) -> LearnedParts:
    """What the added terms learn between these models; samples: of the whole data."""
    widths = {name: clip.config["model_cfg"]["embed_dim"] for name, clip in clips.items()}
    places = {name: clips[name].tower().place_width for name in config.token_models}
    return learned_parts(config, widths, device, samples, places)


def build_teachers(
    settings: dict[str, Teacher],
    clips: dict[str, Clip],
    heads: dict[str, ZeroShotHead],
    stores: dict[str, EmbeddingStore],
    ranks: Ranks,
    dtype: torch.dtype,
) -> Ensemble:
    """The ensemble of a configuration, each teacher run in `dtype`; those in `stores` are not run at all."""
    return {
        name: StoredTeacher(name, stores[name], clips[name].tower(), heads[name], dtype)
        if name in stores
        else FrozenTeacher(name, teacher, clips[name].tower(), heads[name], ranks, dtype)
        for name, teacher in settings.items()
    }


def log_start(
    config: Config,
    folder: RunFolder,
    dataset: Dataset,
    image_size: int,
    head: ZeroShotHead,
    ensemble: Ensemble,
    ranks: Ranks,
    logger: SilentLogger,
) -> None:
    """Print what is trained, on what, and where each teacher lies. Collective."""
    held_by_rank = ranks.all_gather({name: teacher.bytes_here for name, teacher in ensemble.items()})
    origin = f"goes on from {folder.checkpoint.name}" if folder.checkpoint else "starts"
    devices = f"{ranks.world_size} x {ranks.device.type}"
    engine = f"ZeRO {config.engine.zero_stage}, {config.engine.precision}"
    for reason in folder.passed_over[:3]:
        logger.print(f"WARN a newer checkpoint is not whole and was passed over: {reason}")
    logger.print(f"{folder.path}: {config.method.name} {origin}, {devices}, {engine}")
    if slow := slow_precision(config.engine.precision, ranks.device):
        logger.print(slow)
    classes = {
        "labels": f" of {len(head.class_embeddings)} classes",
        "captions": " of classes by caption",
        "none": "",
    }[config.data.targets]
    height, width = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    size = f"{height}" if height == width else f"{width}x{height}"
    scale = f"logit scale {head.logit_scale:.4g}"
    logger.print(f"{len(dataset)} samples{classes}, images {size} px, {scale}")
    for note in dataset.index.notes(labels=config.needs_labels):
        logger.print(f"of the shards: {note}")
    if config.data.targets == "labels":
        for line in class_name_lines(classnames(config.data, dataset), dataset.labels, []):
            logger.print(f"{line['status']} {line['check']}: {line['detail']}")
    for name, teacher in ensemble.items():
        mib = ", ".join(f"{held[name] / 2**20:.2f}" for held in held_by_rank)
        whole = f"{teacher.bytes_whole / 2**20:.2f} MiB"
        logger.print(f"teacher {name}: {teacher.placement}, {whole}, a rank holds {mib} MiB")


def slow_precision(precision: str, device: torch.device) -> str | None:
    """What to say where the device computes in this precision only by a detour: bf16 on a CPU without its instructions.

    Measured on one transformer layer, forward and backward: 2.3 times float32's time with AVX512 alone, 18 times with
    AVX2.
    """
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if precision != "bf16" or device.type != "cpu" or native:
        return None
    return (
        "engine.precision: this CPU has no instructions for bf16, which takes it 2 to 18 times as long as float32; "
        "a run of its own would be faster with engine.precision=float32"
    )
