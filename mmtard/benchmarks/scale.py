"""`mmtard bench scale`: a prediction of a step on many GPUs, part by part, and which part binds first."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import Config, check_world, validate
from ..distillation import attack_objectives
from ..distillation.added_terms import run_passes
from ..errors import UserError
from ..models.image_tower import DTYPES
from ..models.loading import load_skeleton
from ..training.memory import trained_tower
from ..training.throughput import forward_flops_of
from .machine import Machine, damage_named, measured, read_results
from .phase_flops import COMPUTE, phase_flops
from .report import BenchmarkReport, BenchmarkTable
from .timing import Spread

PARTS = (
    "teachers",
    "attack",
    "student",
    "optimiser",
    "ZeRO traffic",
    "teacher gathers",
    "agreement",
    "host",
    "loading",
)
GRADIENT_BYTES = 4  # of a weight: float32, whatever the precision of the forwards
KEPT = 10**9  # weights that ZeRO-3 looks ahead before it lets go of one (DeepSpeed's stage3_max_reuse_distance)
UPDATE_BYTES = 7 * 4  # a weight's update reads weight, gradient and two moments, and writes three of them


@dataclass(frozen=True)
class Work:
    """What a configuration asks for: counted, not assumed."""

    images: int  # of the global batch
    flops: dict[str, float]  # of one image, by phase
    attack_steps: int
    teacher_forwards: int  # of all teachers that run
    trained: int  # weights
    zero_stage: int
    gathered: float  # bytes of sharded teachers, times the gathers of a step
    frozen: int = 0  # weights of the student that do not learn, beside its adapters
    attack_copy: bool = False  # whether the attack has a copy of the student, whole on every rank


@dataclass(frozen=True)
class Prediction:
    """Seconds of each part of a step, by PARTS; `loading` is what it takes beyond all others, which it runs beside."""

    world: int
    parts: dict[str, float]

    @property
    def seconds(self) -> float:
        """The whole step."""
        return sum(self.parts.values())

    @property
    def compute(self) -> float:
        """What of the step is computation."""
        return sum(self.parts[name] for name in COMPUTE)


def work_of(config: Config) -> Work:
    """Count a configuration's work. Raises UserError for a model whose architecture is not known here."""
    clips = {"student": load_skeleton(config.student, "student")}
    for name in config.ensemble:
        clips[name] = load_skeleton(config.model_of(name), f"teachers.{name}")
    models = {name: clip.tower() for name, clip in clips.items()}
    running = [name for name, teacher in config.ensemble.items() if not teacher.stored]
    forward = forward_flops_of(clips)
    if not all(map(math.isfinite, forward.values())):
        raise UserError("bench scale: the arithmetic of one of these architectures cannot be counted; take another")
    passes = run_passes(config)
    named = config.attack_objective
    objective = attack_objectives.find_objective(named, config.fusion) if named else None
    asked = {*passes, *(objective.reference_passes if objective else ())}
    that_run = {name: flops if name in ("student", *running) else 0.0 for name, flops in forward.items()}
    steps, dtype = (config.attack.steps * config.attack.restarts if objective else 0), DTYPES[config.engine.precision]
    gathers = {name: sum(p.model == name for p in asked) for name in running}
    if objective and objective.through_teacher in gathers:
        gathers[objective.through_teacher] += 2 * steps
    sizes = {name: sum(p.numel() for p in models[name].parameters()) * dtype.itemsize for name in running}
    sharded = [name for name in running if config.ensemble[name].placement == "sharded"]
    student = trained_tower(config, False)
    trained, frozen = (
        sum(p.numel() for p in student.parameters() if p.requires_grad is learns) for learns in (True, False)
    )
    return Work(
        images=config.train.batch_size,
        flops=phase_flops(that_run, passes, objective, config.attack, bool(config.student.lora)),
        attack_steps=steps,
        teacher_forwards=sum(p.model in running for p in asked),
        trained=trained,
        zero_stage=config.engine.zero_stage,
        gathered=float(sum(sizes[name] * gathers[name] for name in sharded)),
        frozen=frozen,
        attack_copy=config.engine.attack_copy,
    )


def predict(work: Work, machine: Machine, world: int) -> Prediction:
    """Seconds of each part of a step on `world` GPUs. Nothing overlaps but the loading, which runs beside all else."""
    images, local = work.images / world, min(world, machine.gpus_a_node)
    nodes = math.ceil(world / machine.gpus_a_node)
    kernels = dict(zip(COMPUTE, machine.kernels))
    times = {"teachers": work.teacher_forwards, "attack": work.attack_steps, "student": 1}
    parts = {
        phase: max(
            images * work.flops[phase] / getattr(machine, phase), times[phase] * kernels[phase] * machine.kernel_s
        )
        for phase in kernels
    }
    shared = world if work.zero_stage else 1
    parts["optimiser"] = work.trained * UPDATE_BYTES / shared / machine.memory_bandwidth
    ring = machine.within if nodes == 1 else min(machine.within, machine.between)
    parts["ZeRO traffic"] = zero_bytes(work, world) / ring
    parts["teacher gathers"] = work.gathered * (local - 1) / local / machine.within
    parts["agreement"] = (world - 1) * machine.hop_s
    parts["host"] = machine.host_s
    loading = images / (machine.loaders * machine.images_a_core)
    parts["loading"] = max(0.0, loading - sum(parts.values()))
    return Prediction(world, {name: parts[name] for name in PARTS})


def travelling_weights(work: Work) -> int:
    """Weights and gradients, by number, that a rank sends in a step, and receives, as DeepSpeed's collectives do.

    A ring's all-reduce counts twice: a reduce-scatter and an all-gather. Stages 0 to 2 all-reduce the gradients (also
    where a rank keeps its share alone); 1 and 2 gather the trained weights after the update. Stage 3 reduce-scatters
    the gradients and gathers all weights for a forward, of which those of a small tower stay for its backward; the
    attack's copy asks for the trained ones, without it each attack step for all.
    """
    if work.zero_stage < 3:
        return (3 if work.zero_stage else 2) * work.trained
    weights = work.trained + work.frozen
    for_both = weights if 2 * weights <= KEPT else 2 * weights
    in_attack = work.trained * min(work.attack_steps, 1) if work.attack_copy else for_both * work.attack_steps
    return work.trained + in_attack + for_both


def zero_bytes(work: Work, world: int) -> float:
    """Bytes that a rank of `world` sends, and receives, in a step for gradients and weights."""
    return (world - 1) / world * travelling_weights(work) * GRADIENT_BYTES


def bandwidth_of(path: Path) -> float:
    """Bytes/s of collectives in a node, from what `mmtard bench scale --weak` found there (its JSON).

    The bytes are those that the model counts for the file's own configuration; the seconds are those that its largest
    number of ranks spent in collectives. Raises UserError for a file without such results.
    """
    content = read_results(path, "communication")
    with damage_named(path, "--ranks", "holds no seconds of collectives; run mmtard bench scale --weak again"):
        seconds = {int(world): Spread.of(found).median for world, found in content["communication"].items()}
        world, config = max(seconds), content["config"]
    if world == 1 or not 0 < seconds[world] < math.inf:
        raise UserError(f"--ranks: '{path}' has no time of several ranks; measure with --weak 1,2")
    work = work_of(validate(config))
    return (zero_bytes(work, world) + (world - 1) / world * work.gathered) / seconds[world]


def binds_first(predictions: list[Prediction], work: Work, machine: Machine) -> str:
    """Which part keeps the largest of these worlds furthest from one GPU's arithmetic, shared out."""
    last = max(predictions, key=lambda p: p.world)
    one = predict(work, machine, 1)
    lost = {name: last.parts[name] - (one.parts[name] / last.world if name in COMPUTE else 0) for name in PARTS}
    name = max(lost, key=lambda part: lost[part])
    return f"{name}: {1e3 * lost[name]:.3g} ms of a step of {1e3 * last.seconds:.4g} ms on {last.world} GPUs"


@dataclass
class ScaleBenchmark:
    """The prediction of a configuration's step on each of `worlds` GPUs.

    train, data, ranks: JSON of `mmtard bench train`, `mmtard bench data` and `mmtard bench scale --weak`, measured on
    one GPU and one node of the cluster; without them the A100's defaults are taken.
    """

    config: Config
    worlds: list[int]
    train: Path | None = None
    data: Path | None = None
    ranks: Path | None = None
    machine: Machine = Machine()

    def run(self, out: Path) -> None:
        """Print the table and write it to `out`. UserError for worlds that the batch does not divide over."""
        for world in self.worlds:
            check_world(self.config, world)
        work = work_of(self.config)
        machine = measured(self.machine, self.train, self.data)
        if self.ranks:
            machine = machine.with_measured(self.ranks, {"within": bandwidth_of(self.ranks)})
        self.report(work, machine).publish(out, torch.device("cpu"))

    def report(self, work: Work, machine: Machine) -> BenchmarkReport:
        """The table, its numbers and its assumptions."""
        predictions = [predict(work, machine, world) for world in self.worlds]
        one = predict(work, machine, 1)
        table = BenchmarkTable(
            f"PREDICTION, no measurement: {work.images} images a step on {machine.name}, {machine.gpus_a_node} a node",
            ["GPUs", *(str(p.world) for p in predictions)],
        )
        rows = {"images a GPU": [f"{work.images / p.world:.3g}" for p in predictions]}
        for name in PARTS:
            if any(p.parts[name] for p in predictions):
                rows[f"ms {name}"] = [f"{1e3 * p.parts[name]:.3g}" for p in predictions]
        rows["ms a step"] = [f"{1e3 * p.seconds:.4g}" for p in predictions]
        rows["images/s"] = [f"{work.images / p.seconds:.4g}" for p in predictions]
        rows["of ideal"] = [f"{100 * one.seconds / p.world / p.seconds:.0f} %" for p in predictions]
        table.rows = [[name, *cells] for name, cells in rows.items()]
        numbers = {
            "config": self.config.model_dump(mode="json"),
            "machine": vars(machine),
            "work": vars(work),
            "prediction": {p.world: p.parts for p in predictions},
        }
        return BenchmarkReport([table], numbers, _notes(predictions, work, machine))


def _notes(predictions: list[Prediction], work: Work, machine: Machine) -> list[str]:
    return [
        f"Binds first: {binds_first(predictions, work, machine)}. Of ideal: one GPU's time for all images, shared out.",
        f"Counted: {sum(work.flops.values()) / 1e9:.4g} GFLOP an image, {work.trained / 1e6:.4g} M trained weights, "
        f"{work.attack_steps} attack steps, {work.teacher_forwards} teacher forwards, ZeRO {work.zero_stage}.",
        *machine.sources(),
    ]
