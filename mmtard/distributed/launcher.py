"""Which rank this process is, as its launcher says (torchrun, deepspeed, srun, or none), and on what it computes."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ..errors import UserError

# Slurm numbers the steps of a job from 0. From here on a number is no step of srun: the batch script, a shell.
NO_STEP = 4294967290


@dataclass(frozen=True)
class Launch:
    """One process of a launch; alone without a launcher."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    # Tasks of the Slurm job whose batch script started this process itself, which is then alone; 0 elsewhere.
    tasks_left_out: int = 0


def launch_from_env() -> Launch:
    """This process among those of its launch, from the environment that the launcher made.

    Raises UserError where the variables of the launch do not name a rank of a world.
    """
    if os.environ.get("WORLD_SIZE") and (os.environ.get("RANK") or _count("WORLD_SIZE", 1, least=1) == 1):
        return _launch("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "SLURM_PROCID" not in os.environ:
        if os.environ.get("WORLD_SIZE"):  # Every process would take itself for the first of them.
            raise UserError(
                f"the environment says WORLD_SIZE={os.environ['WORLD_SIZE']} and no RANK; "
                "unset it, or start through torchrun, deepspeed or srun"
            )
        return Launch()
    if not _is_started_by_srun():
        # Slurm tells a batch script that it is task 0 of all: waiting for the others would be waiting for ever.
        tasks = os.environ.get("SLURM_NTASKS", "")
        return Launch(tasks_left_out=int(tasks) if tasks.isdecimal() and tasks != "1" else 0)
    # Slurm sets no SLURM_NTASKS in a script that asked for no tasks.
    return _launch("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")


def world_size_from_env() -> int:
    """Ranks of this launch; 1 without a launcher. Raises UserError like `launch_from_env`."""
    return launch_from_env().world_size


def choose_accelerator(device: str) -> None:
    """Keep DeepSpeed off a GPU that is there, where `engine.device` is cpu. Call before anything imports DeepSpeed."""
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _is_started_by_srun() -> bool:
    step = os.environ.get("SLURM_STEP_ID") or os.environ.get("SLURM_STEPID") or ""
    return step.isdecimal() and int(step) < NO_STEP


def _launch(rank_name: str, world_name: str, local_name: str) -> Launch:
    world, rank = _count(world_name, 1, least=1), _count(rank_name, 0, least=0)
    if rank >= world:
        raise UserError(
            f"the environment says {rank_name}={rank} of {world_name}={world}; ranks count from 0: "
            "unset both, or start through torchrun, deepspeed or srun"
        )
    return Launch(rank, world, _count(local_name, 0, least=0))


def _count(name: str, default: int, least: int) -> int:
    text = os.environ.get(name) or str(default)
    if not (text.isascii() and text.isdigit() and len(text) <= 9) or int(text) < least:
        shown = repr(text) if len(text) <= 60 else f"{text[:60]!r}..."
        raise UserError(
            f"the environment says {name}={shown}, which is no number of at least {least}; "
            "unset it, or start through torchrun, deepspeed or srun"
        )
    return int(text)
