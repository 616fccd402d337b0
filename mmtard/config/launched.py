"""Whether a configuration fits the launch it is given to: its ranks and its shards."""

from __future__ import annotations

import os
from pathlib import Path

from braceexpand import UnbalancedBracesError, braceexpand

from ..errors import UserError
from .schema import Config


def check_world(config: Config, world_size: int) -> int:
    """Micro-batches a rank accumulates each step; UserError when lanes or batch do not divide over the ranks."""
    lanes, batch = config.data.lanes, config.train.batch_size
    if lanes % world_size:
        raise UserError(f"data.lanes: {lanes} lanes cannot be shared by {world_size} ranks; make it a multiple of {world_size}")
    share = batch // world_size
    micro = min(config.train.micro_batch_size or share, share)
    if share % micro:
        raise UserError(f"train.micro_batch_size: {micro} does not divide a rank's {share} samples (batch_size {batch} over {world_size} ranks); choose a divisor of {share}")
    if config.student.batch_norm == "synced" and share != micro:
        raise UserError(f"train.micro_batch_size: student.batch_norm 'synced' takes its statistics over the whole batch; let a rank take its {share} samples at once, or use more ranks")
    return share // micro


def world_size_from_env() -> int:
    """Ranks of this launch as torchrun, the deepspeed launcher or srun announce them; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE") or (os.environ.get("SLURM_NTASKS", "1") if "SLURM_PROCID" in os.environ else "1"))


def expand_shards(shards: str | list[str]) -> list[str]:
    """Every shard that a `data.shards` value names, sorted within each folder.

    A folder means its `*.tar` files, else those of its `train/`. Raises UserError naming a shard that is missing.
    """
    out = []
    for spec in [shards] if isinstance(shards, str) else shards:
        if is_remote(spec) or not Path(spec).is_dir():
            out += _braces(spec)
        else:
            folder = Path(spec)
            found = sorted(folder.glob("*.tar"), key=_natural) or sorted((folder / "train").glob("*.tar"), key=_natural)
            if not found:
                raise UserError(f"data.shards: no .tar in '{spec}'; write shards with `mmtard shards IMAGES {spec}`")
            out += [str(p) for p in found]
    for path in out:
        if not is_remote(path) and not Path(path).is_file():
            raise UserError(f"data.shards: missing shard '{path}'; correct the pattern or restore the file")
    if not out:
        raise UserError("data.shards: names no shard; give a folder, a pattern or a list")
    return out


def is_remote(shard: str) -> bool:
    """Whether a shard is read through an opener (`pipe:`, `file:`, `https://`, `s3://`) and staged first."""
    return shard.startswith(("pipe:", "file:")) or "://" in shard


def _natural(path: Path):
    return (int(path.stem), "") if path.stem.isdigit() else (-1, path.name)


def _braces(spec: str) -> list[str]:
    try:
        return list(braceexpand(spec))
    except (UnbalancedBracesError, ValueError) as error:
        raise UserError(f"data.shards: '{spec}' is not a brace pattern ({error}); write it like train-{{0000..0099}}.tar") from None
