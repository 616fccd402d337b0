"""Random numbers that depend on a sample's own seed, in torch and in numpy: the same at every world size and batch."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from .errors import UserError

# splitmix64's constants as int64
GOLDEN = -7046029254386353131
_MIX1 = -4658895280553007687
_MIX2 = -7723592293110705685

AT_ONCE = 2**18  # numbers that a CPU draws at a time: their dozen passes then stay within its caches


def sample_uniform(seeds: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Uniform numbers in [0,1) that depend on each sample's own seed alone: seeds int64 [B] -> float32 [B, *shape].

    splitmix64 (Steele et al., OOPSLA 2014) in counter mode, in integer arithmetic: the same bits on every device, at
    every batch composition and world size. The upper 24 bits become the number. Raises UserError for seeds of another
    kind.
    """
    _check_seeds(seeds)
    n = torch.Size(shape).numel()
    steps = torch.arange(1, 1 + n, device=seeds.device, dtype=torch.int64).mul_(GOLDEN)
    if torch.compiler.is_compiling() or not seeds.is_cpu or len(seeds) * n <= AT_ONCE:
        numbers = _uniform(seeds, steps)
    else:
        numbers = torch.cat([_uniform(some, steps) for some in seeds.split(max(1, AT_ONCE // n))])
    return numbers.reshape(len(seeds), *shape)


def _uniform(seeds: Tensor, steps: Tensor) -> Tensor:
    """seeds int64 [B], steps int64 [N] -> float32 [B, N]."""
    z = _mix(seeds[:, None] + steps)
    z >>= 40
    z &= (1 << 24) - 1
    return z.to(torch.float32).mul_(2.0**-24)


def derive_seeds(seeds: Tensor, k: int | Tensor) -> Tensor:
    """Each sample's seed of its k-th restart, target or draw: int64 [B] -> int64 [B], unrelated for any two k.

    k: one for all samples, or int64 [B].
    """
    _check_seeds(seeds)
    # Not the step of sample_uniform, so that no seed is one of its numbers. It wraps as int64 does.
    step = torch.full_like(seeds, _MIX1)
    return _mix(seeds + (k + 1) * step)


def _check_seeds(seeds: Tensor) -> None:
    if not isinstance(seeds, Tensor) or seeds.dtype != torch.int64 or seeds.dim() != 1:
        kind = f"{seeds.dtype} {list(seeds.shape)}" if isinstance(seeds, Tensor) else f"a {type(seeds).__name__}"
        raise UserError(f"seeds: {kind}; give int64 [B], one for each sample, such as torch.arange(len(images))")


def _mix(z: Tensor) -> Tensor:
    """The mixing of splitmix64, in place."""
    z ^= _shift(z, 30)
    z *= _MIX1
    z ^= _shift(z, 27)
    z *= _MIX2
    z ^= _shift(z, 31)
    return z


def _shift(z: Tensor, bits: int) -> Tensor:
    # A logical shift: torch shifts int64 arithmetically.
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def permutation(size: int, *seed: int) -> np.ndarray:
    """A permutation of 0..size-1, int64 [size], decided by the integers of `seed`.

    Sorts raw Philox output: numpy promises bit generators' raw streams for all versions, but not its own shuffles.
    """
    raw = np.random.Philox(np.random.SeedSequence(seed)).random_raw(size)
    return np.argsort(raw, kind="stable")


def sample_seeds(seed: int, epochs: int | np.ndarray, sample_ids: int | np.ndarray) -> np.ndarray:
    """One seed for each (epoch, sample id) [B] -> uint64 [B]: m(m(m(seed) ^ epoch) ^ id) with m the step of SplitMix64.

    Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators".
    """
    start = _splitmix64(np.array([seed & (2**64 - 1)], dtype=np.uint64))
    return _splitmix64(
        _splitmix64(start ^ np.asarray(epochs).astype(np.uint64)) ^ np.asarray(sample_ids).astype(np.uint64)
    )


def _splitmix64(x: np.ndarray) -> np.ndarray:
    z = x + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def purpose_salt(purpose: str) -> int:
    """63 bits that set a purpose's random numbers apart from all others of the same seeds."""
    return int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest()) >> 1
