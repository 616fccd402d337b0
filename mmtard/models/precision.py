"""float32 that is float32: TF32 off, for as long as numbers must not depend on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """Turn TF32 off on GPUs; afterwards the process is as it was.

    By default the convolutions of cuDNN, a ViT's patch embedding among them, keep 10 bits of a float32's 23. Works
    whichever of torch's two ways, `allow_tf32` or `fp32_precision`, the process has used before.
    """
    kinds = torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul
    before = [kind.fp32_precision for kind in kinds]
    try:
        for kind in kinds:
            kind.fp32_precision = "ieee"
        yield
    finally:
        for kind, precision in zip(kinds, before):
            kind.fp32_precision = precision
