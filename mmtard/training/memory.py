"""What a run will take of each GPU's memory: weights and states counted, activations traced, without weights or a GPU.

Exact: the parameters, and what the graph keeps for a backward (traced with shapes alone, so what a GPU's kernels keep
may differ a little). By rule: ZeRO's partitions and buffers. Not counted: kernels' working memory, a teacher's
passing activations, the allocator's slack, the CUDA context; keep some 2 GiB for them.
"""

from __future__ import annotations

import math

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..config import Config, check_world
from ..distillation import attack_objectives
from ..distillation.added_terms import run_passes
from ..errors import UserError
from ..models import loading, lora, student
from ..models.attack_copy import cast_by_autocast
from ..models.clip import Clip
from ..models.image_tower import DTYPES, ImageTower, blocks
from .optimizer import bucket_size

GIB, FLOAT32, INT64 = 2**30, 4, 8
GPUS_A_NODE = 8  # assumed: a sharded teacher is whole on every node
ATTACK, TRAINING = "activations, attack step", "activations, training step"
START = "random start of the attack"
ONE_AT_A_TIME = (START, ATTACK, TRAINING)  # each is gone when the next comes
DRAWS = 2  # int64 numbers a pixel that `seeding.sample_uniform` holds at once on a GPU
COPY = "the attack's copy of the weights"


class Saved:
    """Bytes that autograd keeps of a forward, parameters and buffers left out: in all, and of each of the tower's
    blocks.
    """

    def __init__(self, tower: ImageTower, images: torch.Tensor):
        known = {p.untyped_storage()._cdata for p in (*tower.parameters(), *tower.buffers())}
        self.total, self.of_block, kept = 0, {}, []

        def keep(x):
            storage = x.untyped_storage()
            if storage._cdata not in known:
                known.add(storage._cdata)
                kept.append(storage)  # else its address would be given to another
                self.total += storage.nbytes()
            return x

        def enter(block, _):
            self.of_block[block] = -self.total

        def leave(block, *_):
            self.of_block[block] += self.total

        hooks = [h for b in blocks(tower) for h in (b.register_forward_pre_hook(enter), b.register_forward_hook(leave))]
        tower.layout.describe(len(images), torch.zeros(len(images), dtype=torch.int64))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            tower(images)
        for hook in hooks:
            hook.remove()


def per_image(tower: ImageTower, through: bool = False) -> tuple[int, int, int]:
    """(bytes kept for an image, bytes kept however many there are, bytes of its largest block for an image): a tower
    without data.

    What does not grow with the images is the weights' copies in another precision. through: the images ask for a
    gradient.
    """
    with FakeTensorMode():
        _without_data(tower)
        one, two = (Saved(tower, torch.empty(n, 3, *tower.size, requires_grad=through)) for n in (1, 2))
    largest = max((two.of_block[block] - one.of_block[block] for block in one.of_block), default=0)
    return two.total - one.total, 2 * one.total - two.total, largest


def copy_bytes(tower: ImageTower) -> tuple[int, int]:
    """(bytes of the attack's copy of a tower without data beside whole weights, beside weights that ZeRO-3 spreads)."""
    with FakeTensorMode():
        _without_data(tower)
        cast = cast_by_autocast(tower) if tower.autocast else set()
    elements = {name: p.numel() for name, p in tower.named_parameters()}
    in_bf16 = 2 * sum(elements[name] for name in cast)
    return in_bf16, in_bf16 + FLOAT32 * sum(n for name, n in elements.items() if name not in cast)


def _without_data(tower: ImageTower) -> None:
    """Give a tower on the meta device fake weights and buffers on the CPU; inside a FakeTensorMode."""
    for module in tower.modules():
        for name, p in module._parameters.items():
            if p is not None:
                fake = torch.empty(p.shape, dtype=p.dtype)
                module._parameters[name] = nn.Parameter(fake, requires_grad=p.requires_grad)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = torch.empty(b.shape, dtype=b.dtype)


def trained_tower(config: Config, checkpointing: bool) -> ImageTower:
    """The student as it is trained, on the meta device."""
    tower = _model(config, "student").tower()
    tower.autocast = torch.bfloat16 if config.engine.precision == "bf16" else None
    if config.student.lora:
        with torch.device("meta"):
            lora.attach(tower.visual, config.student.lora, tower.layout)
    if checkpointing:
        student.checkpoint_activations(tower)
    return tower.train()


def of_run(config: Config, world: int) -> dict[str, list[float]]:
    """Row -> bytes on each GPU at ZeRO stages 0, 1, 2, 3. Raises UserError for a model whose architecture is not
    known here.
    """
    accumulated, checkpointing = check_world(config, world), config.engine.checkpoint_activations
    tower = trained_tower(config, checkpointing)
    trained, frozen = (
        sum(p.numel() for p in tower.parameters() if p.requires_grad == wanted) for wanted in (True, False)
    )
    batch = config.train.batch_size // world // accumulated
    whole, share = FLOAT32 * trained, FLOAT32 * trained / world
    bucket = FLOAT32 * bucket_size(trained)
    buckets = bucket * (2 if world > 1 else 1)  # one travels while the next one fills
    everything = whole + FLOAT32 * frozen
    rows = {
        "weights": [everything, everything, everything, everything / world],
        "weights gathered for use, at most": [0, 0, 0, everything],
        "weights the optimiser holds": [0, share, share, share],
        "gradients": [whole, whole, share, share],
        "gradients under way": [0, buckets, buckets, 2 * bucket],
        "moments of AdamW": [2 * whole, 2 * share, 2 * share, 2 * share],
    }
    if config.train.ema:
        rows["average of the weights"] = [whole, share, share, share]
    teachers, moving = _of_teachers(config, world)
    rows |= teachers
    if config.data.targets == "captions":
        rows["text towers"] = [
            FLOAT32 * sum(_text_parameters(_model(config, name)) for name in ("student", *config.ensemble))
        ] * 4
    image, copies, _ = per_image(tower)
    block = per_image(trained_tower(config, False))[2] if checkpointing else 0  # computed again, one at a time
    rows |= _of_attack(config, batch, moving, image + block)
    views = sum(p.model == "student" for p in run_passes(config))
    rows["weights in bf16"] = [copies] * 4
    rows[TRAINING] = [views * batch * (image + block)] * 4
    starts = config.attack_objective and (config.attack.random_start or config.attack.restarts > 1)
    rows[START] = [DRAWS * INT64 * batch * 3 * math.prod(tower.size) if starts else 0] * 4
    return rows


def _of_teachers(config: Config, world: int) -> tuple[dict[str, list[float]], int]:
    """(the rows of the teachers that run, what an image keeps of one that the attack's gradient goes through)."""
    rows, moving, dtype = {}, 0, DTYPES[config.engine.precision]
    named = config.attack_objective
    through = attack_objectives.find_objective(named, config.fusion).through_teacher if named else None
    for name, spec in config.ensemble.items():
        if spec.stored:
            continue
        teacher = _model(config, name).tower()
        held = sum(p.numel() for p in teacher.parameters()) * dtype.itemsize
        holders = min(world, GPUS_A_NODE) if spec.placement == "sharded" else 1
        rows[f"teacher {name}, {spec.placement}"] = [held / holders] * 4
        if name == through:
            moving = per_image(teacher.cast(dtype).requires_grad_(False), through=True)[0]
    return rows, moving


def _of_attack(config: Config, batch: int, moving: int, trained_image: int) -> dict[str, list[float]]:
    """The rows of the attack: its copy of the student, and what a step of it keeps of `batch` images.

    moving: of an image, by a teacher that is attacked too. trained_image: of an image, by the trained tower.
    """
    if not config.attack_objective:
        return {ATTACK: [0] * 4}
    engine = config.engine
    checkpointing = engine.checkpoint_activations and engine.checkpoint_attack
    if not engine.attack_copy:
        whole = per_image(trained_tower(config, False))[0]
        return {ATTACK: [batch * ((trained_image if checkpointing else whole) + moving)] * 4}
    image, _, block = per_image(trained_tower(config, checkpointing).eval().requires_grad_(False), through=True)
    if checkpointing:
        block = per_image(trained_tower(config, False).eval().requires_grad_(False), through=True)[2]
    beside_whole, beside_parts = copy_bytes(trained_tower(config, False).eval().requires_grad_(False))
    return {
        COPY: [beside_whole, beside_whole, beside_whole, beside_parts],
        ATTACK: [batch * (image + (block if checkpointing else 0) + moving)] * 4,
    }


def _model(config: Config, name: str) -> Clip:
    if name == "student":
        return loading.load_skeleton(config.student, name)
    return loading.load_skeleton(config.model_of(name), f"teachers.{name}")


def _text_parameters(clip: Clip) -> int:
    return sum(p.numel() for name, p in clip.model.named_parameters() if not name.startswith("visual."))


def total(rows: dict[str, list[float]], stage: int) -> float:
    """The most that is held at once: of a step's parts, the largest."""
    parts = [rows[name][stage] for name in ONE_AT_A_TIME]
    return sum(row[stage] for row in rows.values()) - sum(parts) + max(parts)


def show(config: Config, world: int) -> None:
    """Print the table, the configured stage marked."""
    rows, images = of_run(config, world), config.train.batch_size // world // check_world(config, world)
    table = Table(title=f"GiB a GPU, {world} of them, {images} images each at once", title_justify="left")
    table.add_column("")
    for stage in range(4):
        table.add_column(f"ZeRO {stage}" + (" *" if stage == config.engine.zero_stage else ""), justify="right")
    for name, row in rows.items():
        table.add_row(name, *(f"{value / GIB:.2f}" for value in row))
    table.add_section()
    table.add_row("total", *(f"{total(rows, stage) / GIB:.2f}" for stage in range(4)))
    Console(highlight=False, width=110).print(table)
    kept = "with" if config.engine.checkpoint_activations else "without"
    print(
        f"* engine.zero_stage. Activations {kept} engine.checkpoint_activations; "
        "an estimate, without kernels' working memory, slack and the CUDA context."
        + (f" Nodes of {GPUS_A_NODE} GPUs." if world > GPUS_A_NODE else "")
    )


def what_to_lower(config: Config, world: int) -> str:
    """What makes a run take less of each GPU's memory, and how much less, by the table; most first, as settings."""
    share = config.train.batch_size // world
    micro = share // check_world(config, world)
    changes = {}
    if micro > 1 and config.student.batch_norm != "synced":
        smaller = next(size for size in range(micro // 2, 0, -1) if share % size == 0)
        changes[f"train.micro_batch_size={smaller}"] = {"train": {"micro_batch_size": smaller}}
    if not config.engine.checkpoint_activations:
        changes["engine.checkpoint_activations=true"] = {"engine": {"checkpoint_activations": True}}
    if world > 1 and config.engine.zero_stage < 3:
        changes["engine.zero_stage=3"] = {"engine": {"zero_stage": 3}}
    for name, teacher in config.teachers.items():
        if world > 1 and teacher.placement == "replicated" and not teacher.stored:
            changes[f"teachers.{name}.placement=sharded"] = {"teachers": {name: {"placement": "sharded"}}}
    if not changes:
        return "use more GPUs, or a smaller student"
    try:
        now = total(of_run(config, world), config.engine.zero_stage)
        saved = {words: now - _total_with(config, change, world) for words, change in changes.items()}
    except UserError:  # a model whose architecture only its weights tell
        return f"set {', or '.join(changes)}"
    best = sorted(saved, key=saved.get, reverse=True)
    return "set " + ", or ".join(f"{words} ({saved[words] / GIB:.2g} GiB less)" for words in best if saved[words] > 0)


def _total_with(config: Config, change: dict, world: int) -> float:
    changed = config
    for section, values in change.items():
        if section == "teachers":
            values = {
                name: teacher.model_copy(update=values.get(name, {})) for name, teacher in config.teachers.items()
            }
            changed = changed.model_copy(update={section: values})
        else:
            part = getattr(changed, section).model_copy(update=values)
            changed = changed.model_copy(update={section: part})
    return total(of_run(changed, world), changed.engine.zero_stage)
