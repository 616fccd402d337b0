"""FLOPs of a step, images a second, memory."""

from __future__ import annotations

import copy
import json
import math
import os
import re
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..config import Attack
from ..distillation.attack_objectives import Objective
from ..distillation.methods import Pass
from ..models.clip import Clip
from ..models.image_tower import ImageTower

# Dense peak of a device in bf16 and in float32 without TF32, in FLOP/s, by words of its name (NVIDIA's data sheets); of
# those that fit, the first counts.
PEAK = {
    "A100": (312e12, 19.5e12),
    "H100 PCIe": (756e12, 51e12),
    "H100 NVL": (835e12, 60e12),
    "H100": (989e12, 67e12),
    "H200 NVL": (835e12, 60e12),
    "H200": (989e12, 67e12),
    "GH200": (989e12, 67e12),
    "B200": (2250e12, 75e12),
    "GB200": (2500e12, 80e12),
}


def forward_flops(tower: ImageTower) -> float:
    """FLOPs of one image's forward (a multiply-add is two), counted by torch without computing anything.

    NaN for a tower that torch cannot count: the number is only shown, so it never ends a run.
    """
    try:
        # A copy without the weights' bytes, which take seconds for a large teacher, and without gradients: torch's
        # counter fails at a weight that is expanded outside autograd, as the query of SigLIP's pooling is.
        empty = {id(t): t.to("meta") for t in tower.visual.buffers()}
        empty |= {id(t): torch.nn.Parameter(t.detach().to("meta"), False) for t in tower.visual.parameters()}
        visual = copy.deepcopy(tower.visual, empty).to("meta").eval()  # batch norm in training refuses one image
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            visual(torch.empty(1, 3, *tower.size, device="meta", dtype=tower.dtype))
        return counter.get_total_flops()
    except Exception:  # whatever an architecture's own code raises on tensors without data
        return math.nan


def forward_flops_of(clips: dict[str, Clip]) -> dict[str, float]:
    """`forward_flops` of each model's image tower, by name; those of one architecture are counted once."""
    counted: dict[str, float] = {}
    architectures = {name: json.dumps(clip.config["model_cfg"], sort_keys=True) for name, clip in clips.items()}
    for name, architecture in architectures.items():
        if architecture not in counted:
            counted[architecture] = forward_flops(clips[name].tower())
    return {name: counted[architecture] for name, architecture in architectures.items()}


def sample_flops(
    forward: dict[str, float], passes: set[Pass], objective: Objective | None, attack: Attack, adapters: bool = False
) -> float:
    """FLOPs of training on one sample, from the forward FLOPs of each model (`student` and the teachers' names).

    A differentiated pass of the student costs three forwards, or two where only low-rank `adapters` learn: the frozen
    weights ask for no gradient. An attack step costs two of every model that the gradient goes through, since the
    input gradient costs as much as the forward. A teacher's pass costs one, and so does the loss after each of
    several restarts. objective: what the attack maximises; None: no attack is made.
    """
    training = sum((2 if adapters else 3) * forward["student"] for p in passes if p.model == "student")
    training += sum(forward[p.model] for p in passes if p.model != "student")
    if objective is None:
        return training
    steps = attack.steps + (attack.algorithm == "apgd")
    comparisons = attack.restarts if attack.restarts > 1 else 0
    attacked = forward["student"] + (forward[objective.through_teacher] if objective.through_teacher else 0)
    # Reference passes that the loss asks for anyway are paid for.
    references = sum(forward[p.model] for p in objective.reference_passes if p.model == "student" or p not in passes)
    return training + references + (2 * steps * attack.restarts + comparisons) * attacked


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The device's dense peak in FLOP/s in a precision (bf16, or float32 without TF32).

    None where it is not known, as for a slice of a GPU (MIG).
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if "MIG" in name:
        return None
    # Whole words: an RTX A1000 is no A100.
    of_device = next((peaks for words, peaks in PEAK.items() if re.search(rf"\b{words}\b", name)), None)
    return of_device and of_device[precision == "float32"]


def cost(
    seconds: float, images: int, flops: float, peak: float | None, world_size: int, device: torch.device
) -> dict[str, float]:
    """What a step of `images`, `flops` each, took in `seconds`.

    `mfu` is the share of the peak, where that is known; without a count of FLOPs (NaN) both columns are left out.
    """
    done = images * flops / seconds / world_size
    columns = {"seconds": seconds, "images_per_s": images / seconds}
    if not math.isnan(done):
        columns["tflops_a_rank"] = done / 1e12
        if peak:
            columns["mfu"] = done / peak
    return columns | memory(device)


def memory(device: torch.device) -> dict[str, float]:
    """GiB this process takes.

    On CUDA the peaks since the last call: `memory_gib` of its tensors, `reserved_gib` of what torch's allocator held
    for them, which is what the GPU must have beside the CUDA context. On the CPU the resident set.
    """
    if device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        torch.cuda.reset_peak_memory_stats(device)
        return {"memory_gib": allocated / 2**30, "reserved_gib": reserved / 2**30}
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {"memory_gib": pages * os.sysconf("SC_PAGE_SIZE") / 2**30}
