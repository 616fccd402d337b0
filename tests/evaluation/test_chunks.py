"""Batches as large as the memory allows."""

import pytest
import torch

from mmtard.attacks.batching import AdaptiveBatchSize
from mmtard.errors import UserError


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
