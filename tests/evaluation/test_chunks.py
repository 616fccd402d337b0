"""Batches as large as the memory allows."""

import pytest
import torch

from mmtard.attacks.batching import AdaptiveBatchSize
from mmtard.errors import UserError


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: out of memory",
    ],
)
def test_a_workspace_of_cudas_libraries_that_finds_no_memory_halves_too(words):
    def work(x):
        if len(x) > 2:
            raise RuntimeError(words)
        return len(x)

    said = []
    assert AdaptiveBatchSize(4, said.append)(work, [torch.zeros(4)]) == [2, 2] and len(said) == 1


def test_any_other_error_of_a_batch_is_raised():
    def work(x):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        AdaptiveBatchSize(4, lambda line: None)(work, [torch.zeros(4)])


def test_a_batch_that_does_not_fit_is_halved_for_good_and_nothing_is_lost():
    said, sizes = [], []

    def work(x, y):
        sizes.append(len(x))
        if len(x) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return (x + y).tolist()

    halving = AdaptiveBatchSize(16, said.append)
    x = torch.arange(21)
    assert sum(halving(work, [x, x]), []) == (2 * x).tolist()
    assert sizes == [16, 8, 4, 4, 4, 4, 4, 1] and said == [
        f"out of GPU memory: {n} images at once from here on" for n in (8, 4)
    ]
    sizes.clear()
    halving(work, [x[:8], x[:8]])
    assert sizes == [4, 4]


def test_one_image_that_does_not_fit_ends_it():
    def work(x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match="memory is too small for one image"):
        AdaptiveBatchSize(4, lambda _: None)(work, [torch.zeros(3)])
