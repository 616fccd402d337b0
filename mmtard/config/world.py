"""Whether a configuration fits the number of ranks that it is launched on."""

from __future__ import annotations

import os

from ..errors import UserError
from .schema import Config
from .values import shorten


def check_world(config: Config, world_size: int) -> int:
    """Micro-batches a rank accumulates each step; UserError when lanes or batch do not divide over the ranks."""
    lanes, batch = config.data.lanes, config.train.batch_size
    if lanes % world_size:
        raise UserError(
            f"data.lanes: {lanes} lanes cannot be shared by {world_size} ranks; make it a multiple of {world_size}"
        )
    share = batch // world_size
    micro = min(config.train.micro_batch_size or share, share)
    if share % micro:
        raise UserError(
            f"train.micro_batch_size: {micro} does not divide a rank's {share} samples "
            f"(batch_size {batch} over {world_size} ranks); choose a divisor of {share}"
        )
    if config.student.batch_norm == "synced" and share != micro:
        raise UserError(
            "train.micro_batch_size: student.batch_norm 'synced' takes its statistics over the whole batch; "
            f"let a rank take its {share} samples at once, or use more ranks"
        )
    return share // micro


def world_size_from_env() -> int:
    """Ranks of this launch as torchrun, the deepspeed launcher or srun announce them; 1 without a launcher.

    Raises UserError where the variables of the launch do not name a rank of a world.
    """
    launcher = bool(os.environ.get("WORLD_SIZE"))
    if not launcher and "SLURM_PROCID" not in os.environ:
        return 1
    names = ("WORLD_SIZE", "RANK") if launcher else ("SLURM_NTASKS", "SLURM_PROCID")
    world = _count(names[0], 1, least=1)
    rank = _count(names[1], 0, least=0)
    if rank >= world:
        raise UserError(
            f"the environment says {names[1]}={rank} of {names[0]}={world}; ranks count from 0: "
            "unset both, or start through torchrun, deepspeed or srun"
        )
    return world


def _count(name: str, default: int, least: int) -> int:
    text = os.environ.get(name) or str(default)
    if not (text.isascii() and text.isdigit() and len(text) <= 9) or int(text) < least:
        raise UserError(
            f"the environment says {name}={shorten(text)}, which is no number of at least {least}; "
            "unset it, or start through torchrun, deepspeed or srun"
        )
    return int(text)
