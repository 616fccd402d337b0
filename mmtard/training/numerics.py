"""How exactly a training computes on a GPU: float32 that is float32, and kernels that repeat their bits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from ..config.training import Engine
from ..models.precision import full_float32

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def numerics(engine: Engine) -> Iterator[None]:
    """Compute as the `engine` section says; afterwards the process is as it was.

    `precision: float32` turns TF32 off: cuDNN's convolutions would keep 10 of a float32's 23 bits. `deterministic`
    asks for deterministic kernels; an operation that has none warns. Must begin before CUDA does, whose cuBLAS reads
    its workspace from the environment, and keeps it.
    """
    with ExitStack() as stack:
        if engine.precision == "float32":
            stack.enter_context(full_float32())
        if engine.deterministic:
            stack.enter_context(_deterministic())
        yield


@contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    ours = WORKSPACE not in os.environ
    os.environ.setdefault(WORKSPACE, ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        if ours:
            os.environ.pop(WORKSPACE, None)
