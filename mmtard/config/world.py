"""Whether a configuration fits the number of ranks that it is launched on."""

from __future__ import annotations

from ..errors import UserError
from .schema import Config


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
