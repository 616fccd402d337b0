"""Batches as large as the GPU's memory allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..errors import UserError

# What CUDA's libraries say where their own workspace found no memory: a plain RuntimeError.
NO_WORKSPACE = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "CUDA error: out of memory")


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that the device's memory is too small, in torch's words or in those of CUDA's libraries."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in NO_WORKSPACE)


class AdaptiveBatchSize:
    """Splits a chunk into batches of at most `limit` samples; halves `limit` for good when memory is too small.

    say: takes a line of text whenever the limit changes.
    """

    def __init__(self, limit: int, say: Callable[[str], object] = print):
        self.limit, self.say = limit, say

    def __call__(self, work: Callable, tensors: Sequence[torch.Tensor]) -> list:
        """[work(*a batch of each tensor), ...], in order. Raises UserError when not even one sample fits."""
        done, at = [], 0
        while at < len(tensors[0]):
            try:
                done.append(work(*(t[at : at + self.limit] for t in tensors)))
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                if self.limit == 1:
                    raise UserError(
                        "--device: the GPU's memory is too small for one image; "
                        "end what else runs on it, or use another"
                    ) from None
            else:
                at += self.limit
                continue
            self.limit = -(-self.limit // 2)
            self.say(f"out of GPU memory: {self.limit} images at once from here on")
            torch.cuda.empty_cache()
        return done
