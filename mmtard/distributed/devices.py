"""Which device a rank computes on, and what a GPU says that fails."""

from __future__ import annotations

import os
import platform

import torch

from ..errors import UserError
from .gpu_driver import driver_version, why_too_old

# What a CUDA error says that no other GPU would mend: the program's fault, or a setting's.
NO_GPU_FAULT = (
    "out of memory",
    "device-side assert",
    "illegal memory access",
    "misaligned address",
    "invalid argument",
    "invalid configuration",
    "invalid device",
    "no kernel image",
    "driver version is insufficient",
)
GIVEN = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE")  # set where Slurm gave GPUs


def rank_device(device: str, local: int) -> torch.device:
    """Where a rank computes: on the GPU of its local rank, or on the only one that Slurm lets its task see.

    device: auto | cpu | cuda. Raises UserError when a GPU is asked for, or Slurm gave some, and torch sees none, and
    when local ranks would share one.
    """
    available, env = torch.cuda.is_available(), os.environ
    too_old = None if available else why_too_old(torch.version.cuda, driver_version())
    if device == "cuda" and not available:
        remedy = too_old or "set engine.device=cpu or run where one is"
        raise UserError(f"engine.device: 'cuda', but torch sees no GPU here; {remedy}")
    if device == "auto" and not available:
        given = next((f"{name}={env[name]}" for name in GIVEN if env.get(name)), None)
        if given and env.get("SLURM_GPUS_ON_NODE") != "0":
            build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
            remedy = too_old or "install a torch for the node's driver (nvidia-smi tells its CUDA version)"
            raise UserError(
                f"engine.device: 'auto' finds no GPU on {platform.node()}, though Slurm gave this job some ({given}): "
                f"torch {torch.__version__}, {build}, sees none; {remedy}, or set engine.device=cpu "
                "(evaluate: --device cpu)"
            )
    if device == "cpu" or not available:
        return torch.device("cpu")
    seen = torch.cuda.device_count()
    if local < seen:
        return torch.device("cuda", local)
    # --gpus-per-task=1 and --gpu-bind=single:1 show each task one GPU. These differ when the step has one for each.
    if seen == 1 and env.get("SLURM_LOCALID") == str(local) and local < int(env.get("SLURM_GPUS_ON_NODE") or 0):
        return torch.device("cuda", 0)
    raise UserError(f"local rank {local} has no GPU of its own: torch sees {seen}; start one process a GPU")


def gpu_fault(error: BaseException | None) -> str | None:
    """What a GPU that fails says (ECC, a launch failure, off the bus); None for any other error.

    An index beyond a table or too little memory is no fault of the GPU.
    """
    if not isinstance(error, getattr(torch, "AcceleratorError", ())) or isinstance(error, torch.OutOfMemoryError):
        return None
    text = " ".join(str(error).split())
    return (
        None if any(words in text for words in NO_GPU_FAULT) else text.partition(" CUDA kernel errors might")[0][:300]
    )
