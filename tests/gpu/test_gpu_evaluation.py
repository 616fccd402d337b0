"""An evaluation on one GPU: batches that are halved when memory is too small, and the CPU's numbers."""

import contextlib
from fractions import Fraction
from unittest import mock

import pytest
import torch
from open_clip.transformer import VisionTransformer

from mmtard.attacks import ensemble
from mmtard.attacks.batching import AdaptiveBatchSize
from mmtard.attacks.state import AttackSettings
from mmtard.models.image_tower import ImageTower
from mmtard.models.precision import full_float32
from mmtard.zero_shot import ZeroShotHead

from .conftest import DEVICE

N, PIXELS, CLASSES = 64, 32, 4
ATTACKS, SETTINGS = (
    ["pgd", "apgd-ce", "apgd-t", "fab-t", "square"],
    AttackSettings(float(Fraction(2, 255)), iters=4, queries=20),
)


@pytest.fixture(scope="module")
def victim():
    """(model, images, labels as the model sees them, seeds) on the device; the model's activations take room."""
    torch.manual_seed(0)
    width = 256 if DEVICE == "cuda" else 32
    visual = VisionTransformer(
        image_size=PIXELS, patch_size=4, width=width, layers=2, heads=4, mlp_ratio=4, output_dim=16
    )
    tower = ImageTower(visual, (0.5,) * 3, (0.25,) * 3).eval().requires_grad_(False).to(DEVICE)
    head = ZeroShotHead(torch.nn.functional.normalize(torch.randn(CLASSES, 16), dim=-1).to(DEVICE), 20.0)
    images, seeds = torch.rand(N, 3, PIXELS, PIXELS).to(DEVICE), torch.arange(N).to(DEVICE)
    with torch.no_grad(), full_float32():
        labels = head(tower(images)).logits.argmax(1)
    return tower, head, images, labels, seeds


def attacked(victim, limit: int, said: list):
    """Which samples fall, attacked in batches that begin with `limit`."""
    tower, head, *tensors = victim

    def attack(images, labels, seeds):
        model = lambda x: head(tower(x)).logits
        return ensemble.run_attacks(model, images, labels, seeds, ATTACKS, SETTINGS).robust.cpu()

    with full_float32():
        return torch.cat(AdaptiveBatchSize(limit, said.append)(attack, tensors))


@contextlib.contextmanager
def memory_for(images: int, victim):
    """As much memory as batches of so many images take: no more from torch's allocator.

    In a rehearsal the model itself says that larger ones do not fit.
    """
    tower = victim[0]
    if DEVICE != "cuda":
        plain = ImageTower.forward

        def forward(self, x, *args, **kwargs):
            if len(x) > images:
                raise torch.OutOfMemoryError("CUDA out of memory. (a rehearsal)")
            return plain(self, x, *args, **kwargs)

        with mock.patch.object(ImageTower, "forward", forward):
            yield
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    x = victim[2][:images].clone().requires_grad_()
    torch.autograd.grad(tower(x).sum(), x)
    del x
    needed = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction(min(1.0, 1.15 * needed / total))
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_batches_are_halved_when_memory_is_too_small_and_the_numbers_stay(victim):
    whole = attacked(victim, 16, [])
    said = []
    with memory_for(16, victim):
        halved = attacked(victim, N, said)
    assert said and all(line.startswith("out of GPU memory: ") for line in said)
    # Another batch size is another order of sums: a sample at the edge may fall in one and stand in the other.
    assert int((halved != whole).sum()) <= 1


def test_gpu_and_cpu_find_the_same_samples_robust(victim):
    tower, head, images, labels, seeds = victim
    found = attacked(victim, N, [])
    on_cpu = [t.cpu() for t in (images, labels, seeds)]
    again = ImageTower(tower.visual, (0.5,) * 3, (0.25,) * 3).cpu()
    try:
        other = attacked((again, ZeroShotHead(head.class_embeddings.cpu(), head.logit_scale), *on_cpu), N, [])
    finally:
        tower.to(DEVICE)
    print(f"\n{int(found.sum())} of {N} stand on the GPU, {int(other.sum())} on the CPU")
    assert int((found != other).sum()) <= 2
