"""How fast a device multiplies two large matrices: what the share of a model's arithmetic is measured by."""

from __future__ import annotations

import torch

from ..models.image_tower import DTYPES
from .timing import timed

GPU_ROWS, CPU_ROWS = 8192, 2048
REPEATS = 5


def matrix_rate(device: torch.device, precision: str) -> float:
    """FLOP/s of the best of several products of two square matrices, in the precision of the forwards."""
    size = GPU_ROWS if device.type == "cuda" else CPU_ROWS
    a, b = (torch.randn(size, size, device=device, dtype=DTYPES[precision]) for _ in range(2))
    torch.mm(a, b)
    return 2 * size**3 / min(timed(lambda: torch.mm(a, b), device) for _ in range(REPEATS))
