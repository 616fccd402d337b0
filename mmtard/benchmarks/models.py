"""What a training step needs, without data: models of a configuration, random classes, one random batch that stays."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Config, check_world
from ..data.samples import Batch
from ..distillation.task import DistillationTask
from ..distributed.ranks import Ranks
from ..models.attack_copy import frozen_twin
from ..models.clip import Clip
from ..models.image_tower import DTYPES, freeze
from ..models.loading import load_clip_on_all_ranks
from ..models.student import trainable_tower
from ..models.teachers import FrozenTeacher, compile_teachers
from ..models.vision_transformer import lighten, restore
from ..seeding import purpose_salt
from ..training.engine import Engine
from ..training.setup import learned_of
from ..training.throughput import forward_flops, forward_flops_of
from ..zero_shot import ZeroShotHead
from .published import PublishedModels


@dataclass
class ResidentParts:
    """A step of mmtard without a run: what it trains with, and one batch, all on the device."""

    engine: Engine
    task: DistillationTask
    teachers: dict[str, FrozenTeacher]
    heads: dict[str, ZeroShotHead]
    batch: Batch
    flops: dict[str, float]  # of one image's forward, by model
    open_clip_flops: dict[str, float]  # the same where towers compute as open_clip has them
    published: PublishedModels | None

    def stored(self, task: DistillationTask) -> dict[str, Tensor]:
        """The embeddings [b,D] of the batch's clean images, of each teacher that could be stored for a task."""
        pixels = self.batch.pixels(self.batch.images.device)
        asked = task.passes | task.reference_passes
        return {
            name: teacher(pixels).embeddings
            for name, teacher in self.teachers.items()
            if {p.image for p in asked if p.model == name} == {"clean"}
            and name not in task.token_models
            and (task.objective is None or task.objective.through_teacher != name)
        }

    def stored_by_configuration(self, task: DistillationTask) -> dict[str, Tensor]:
        """Of `stored`, the embeddings of the teachers that the configuration stores."""
        return {name: z for name, z in self.stored(task).items() if task.config.ensemble[name].stored}


def resident_parts(
    config: Config, ranks: Ranks, classes: int, published: bool, samples: int | None = None
) -> ResidentParts:
    """Make them. published: also copies of the models for the published step, in float32, of a configuration that
    `check_comparable` accepts.

    samples: of the data that the step is shown; None: the resident batch alone.
    """
    clips = {"student": load_clip_on_all_ranks(config.student, ranks, config.seed)} | {
        name: load_clip_on_all_ranks(config.model_of(name), ranks, config.seed, f"teachers.{name}")
        for name in config.ensemble
    }
    device = ranks.device
    heads = {
        name: ZeroShotHead(
            random_classes(classes, clip.config["model_cfg"]["embed_dim"], name).to(device), clip.logit_scale
        )
        for name, clip in clips.items()
    }
    flops, open_clip_flops = forward_flops_of(clips), flops_as_open_clip(clips)
    student = clips["student"].tower()
    learned = learned_of(config, clips, device, samples or config.train.batch_size)
    # Teachers in float32 serve both sides.
    own = config.engine.precision != "float32"
    originals = _published_models(clips, heads, device, own) if published else None
    engine = Engine(config, trainable_tower(config, clips["student"], None), ranks)
    dtype = DTYPES[config.engine.precision]
    teachers = {
        name: FrozenTeacher(name, settings, clips[name].tower(), heads[name], ranks, dtype)
        for name, settings in config.ensemble.items()
    }
    task = DistillationTask(config, engine, heads["student"], teachers, learned)
    engine.compile(config.engine.compile, print)
    compile_teachers(config.engine.compile, teachers, device, print)
    share = config.train.batch_size // ranks.world_size
    check_world(config, ranks.world_size)
    batch = random_batch(share, student.size, classes, ranks.rank).to(device)
    return ResidentParts(engine, task, teachers, heads, batch, flops, open_clip_flops, originals)


def flops_as_open_clip(clips: dict[str, Clip]) -> dict[str, float]:
    """FLOPs of one image's forward through each model's tower where it computes as open_clip does, by name."""
    found = {}
    for name, clip in clips.items():
        tower = clip.tower()
        restore(tower.visual)
        found[name] = forward_flops(tower)
        lighten(tower.visual)
    return found


def _published_models(
    clips: dict[str, Clip], heads: dict[str, ZeroShotHead], device: torch.device, own_teachers: bool
) -> PublishedModels:
    towers = {"student": copy.deepcopy(clips["student"].tower()).to(device)}
    for name in ("clean", "robust"):
        tower = clips[name].tower().to(device)
        towers[name] = freeze(copy.deepcopy(tower), torch.float32, device) if own_teachers else frozen_twin(tower)
    for tower in towers.values():
        restore(tower.visual)
    return PublishedModels(
        student=towers["student"],
        clean=towers["clean"],
        robust=towers["robust"],
        third=towers["clean"],
        student_head=heads["student"],
        clean_head=heads["clean"],
        robust_head=heads["robust"],
    )


def random_classes(classes: int, dimensions: int, purpose: str) -> Tensor:
    """Class embeddings [C,D] of unit length, the same at every call."""
    generator = torch.Generator().manual_seed(purpose_salt(purpose))
    return F.normalize(torch.randn(classes, dimensions, generator=generator), dim=-1)


def random_batch(size: int, image_size: tuple[int, int], classes: int, seed: int = 0) -> Batch:
    """A batch of random images, labels and seeds, the same at every call with one seed."""
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        images=torch.randint(256, (size, 3, *image_size), generator=generator, dtype=torch.uint8),
        labels=torch.randint(classes, (size,), generator=generator),
        sample_ids=torch.arange(size),
        seeds=torch.randint(2**60, (size,), generator=generator),
        captions=[""] * size,
    )
