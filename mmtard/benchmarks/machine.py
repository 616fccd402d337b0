"""What a cluster is assumed to do: the numbers of the cost model that are not counted from the configuration."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import UserError
from .timing import Spread

STORED = "as stored"  # what `mmtard bench data` calls shards as they are
# Which part of `mmtard bench` writes what.
_PART_OF = {"variants": "train", "core": "data", "communication": "scale --weak"}


@dataclass(frozen=True)
class Machine:
    """A cluster of equal nodes, and how fast it does each kind of work; by default of eight A100 SXM4 a node.

    Rates are FLOP/s of one GPU, bandwidths bytes/s. Only what NVIDIA's data sheets say is known (bf16 peak 312 TFLOP/s;
    NVLink 300 GB/s each way; a DGX A100's eight 200 Gbit/s network cards); all else is assumed, and replaced by what a
    measurement says. No A100 was at hand.
    """

    gpus_a_node: int = 8
    # Shares of the peak: large matrices, small ones between many elementwise kernels, forward and backward.
    teachers: float = 0.45 * 312e12
    attack: float = 0.30 * 312e12
    student: float = 0.33 * 312e12
    kernel_s: float = 10e-6  # the host needs so long to launch one: small batches take no less
    kernels: tuple[int, int, int] = (250, 500, 800)  # of a teacher's forward, an attack step, the student's step
    memory_bandwidth: float = 1.5e12 * 0.8  # the optimizer's update is bound by it
    within: float = 0.75 * 300e9  # of a collective among the GPUs of a node
    between: float = 0.75 * 8 * 25e9  # of a node to the others, all its cards together
    hop_s: float = 8e-6  # a small message from one GPU to the next
    loaders: int = 12  # cores that decode, a GPU: those of slurm/train_vitb32.sh
    images_a_core: float = 300.0  # images/s of 500x375, ImageNet's commonest size: docs/performance.md has 306
    host_s: float = 5e-3  # a step: what the loop does while the GPU has nothing to do
    measured_in: dict[str, str] = field(default_factory=dict)  # the file's name, by the field that it replaced

    @property
    def name(self) -> str:
        """What its GPUs are, in a table's title."""
        file = self.measured_in.get("attack") or self.measured_in.get("student")
        return f"GPUs as measured in {file}" if file else "assumed A100s"

    def with_measured(self, path: Path, found: dict[str, float]) -> Machine:
        """The machine with what a file says of some of its fields."""
        return replace(self, **found, measured_in=self.measured_in | dict.fromkeys(found, path.name))

    def sources(self) -> list[str]:
        """A sentence for each file that something was measured in, and one of what is assumed."""
        words = {
            "teachers": f"teachers {self.teachers / 1e12:.3g} TFLOP/s a GPU",
            "attack": f"attack {self.attack / 1e12:.3g} TFLOP/s a GPU",
            "student": f"student {self.student / 1e12:.3g} TFLOP/s a GPU",
            "images_a_core": f"{self.images_a_core:.4g} images/s a core",
            "within": f"{self.within / 1e9:.4g} GB/s in a node",
            "between": f"{self.between / 1e9:.4g} GB/s a node to others",
            "memory_bandwidth": f"{self.memory_bandwidth / 1e9:.4g} GB/s of a GPU's memory",
            "kernel_s": f"{1e6 * self.kernel_s:.3g} us a kernel at least",
            "hop_s": f"{1e6 * self.hop_s:.3g} us a hop",
            "loaders": f"{self.loaders} cores a GPU that load",
            "host_s": f"{1e3 * self.host_s:.3g} ms of the host a step",
        }
        files = list(dict.fromkeys(self.measured_in.values()))
        measured = [
            f"Measured in {file}: {', '.join(words[name] for name in words if self.measured_in.get(name) == file)}."
            for file in files
        ]
        assumed = ", ".join(of_field for name, of_field in words.items() if name not in self.measured_in)
        return [*measured, f"Assumed, as of A100s: {assumed}. Traffic does not overlap with arithmetic."]


def measured(machine: Machine, train: Path | None, data: Path | None) -> Machine:
    """The machine with what `mmtard bench train` and `mmtard bench data` found (their JSON) in place of assumptions.

    A phase that the file's configuration does not have keeps its assumption. Raises UserError for a file that holds no
    such results.
    """
    if train is not None:
        machine = machine.with_measured(train, _rates(train))
    if data is not None:
        machine = machine.with_measured(data, {"images_a_core": _images_a_core(data)})
    return machine


def _rates(path: Path) -> dict[str, float]:
    """FLOP/s of each phase: the file's own count, since its models may be others than those predicted for."""
    content = read_results(path, "variants")
    problem = "holds no seconds and FLOPs of each phase of the variant 'mmtard'; run mmtard bench train again"
    with damage_named(path, "--train", problem):
        own = content["variants"]["mmtard"]
        images = _positive(content["config"]["train"]["batch_size"]) / _positive(content.get("world_size", 1))
        seconds = {
            name: Spread.of([float(p.get(name, 0.0)) for p in own["phases"]]).median for name in own["phases"][0]
        }
        student = seconds.get("student forward", 0.0) + seconds.get("student backward", 0.0)
        taken = {"teachers": seconds.get("teachers", 0.0), "attack": seconds.get("attack", 0.0), "student": student}
        flops = own["flops_by_phase"]
        ran = [name for name in taken if taken[name] or name == "student"]  # no step is without the student's
        return {name: images * _positive(flops[name]) / _positive(taken[name]) for name in ran}


def _images_a_core(path: Path) -> float:
    content = read_results(path, "core")
    with damage_named(path, "--data", "holds no rate of the shards as stored; run mmtard bench data again"):
        return _positive(Spread.of([_positive(one) for one in content["core"][STORED]["images_per_cpu_s"]]).median)


@contextmanager
def damage_named(path: Path, flag: str, problem: str) -> Iterator[None]:
    """What a damaged file runs into, as a UserError of one line that names it."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError):
        raise UserError(f"{flag}: '{path}' {problem}") from None


def _positive(value: float) -> float:
    """A number that is finite and above 0. Raises ValueError for any other, TypeError for what is none."""
    if isinstance(value, str) or not 0 < value < math.inf:
        raise ValueError(value)
    return value


def read_results(path: Path, key: str) -> dict:
    """The JSON that a part of `mmtard bench` wrote. UserError for a file that holds no `key`."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError("no file")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "it is no JSON"
        raise UserError(f"'{path}' cannot be read: {reason}; give the --out of mmtard bench") from None
    if not isinstance(content, dict) or key not in content:
        raise UserError(f"'{path}' holds no '{key}'; give the --out of mmtard bench {_PART_OF[key]}")
    return content
