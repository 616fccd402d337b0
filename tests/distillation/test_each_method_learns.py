"""Every objective's loss falls on photographs of CIFAR-10. Needs the research images of ../shared/data; skipped where
they are absent.
"""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from parallel.each_method import Plain, PlainTeacher
from PIL import Image

from mmtard import config
from mmtard.config import METHODS
from mmtard.distillation.task import DistillationTask
from mmtard.models.image_tower import ImageTower
from mmtard.zero_shot import ZeroShotHead

SOURCE = Path(__file__).parents[3] / "shared" / "data" / "cifar10_test_webp.npz"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not SOURCE.is_file(), reason=f"needs {SOURCE}")]
STEPS, BATCH, N = 20, 32, 128


def tower(seed: int, width: int = 64, embedding: int = 32) -> ImageTower:
    torch.manual_seed(seed)
    visual = VisionTransformer(
        image_size=32, patch_size=8, width=width, layers=2, heads=2, mlp_ratio=2, output_dim=embedding
    )
    return ImageTower(visual, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def head(embedding: int = 32) -> ZeroShotHead:
    return ZeroShotHead(
        F.normalize(torch.randn(10, embedding, generator=torch.Generator().manual_seed(embedding)), dim=-1), 20.0
    )


@pytest.fixture(scope="module")
def batches():
    """Four batches of photographs, their labels and seeds."""
    with np.load(SOURCE) as stored:
        blob, offset, label = (stored[name] for name in ("blob", "offset", "label"))
    pixels = [
        np.asarray(Image.open(io.BytesIO(blob[offset[i] : offset[i + 1]].tobytes())).convert("RGB")) for i in range(N)
    ]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    labels = torch.from_numpy(label[:N].astype(np.int64))
    return list(zip(images.split(BATCH), labels.split(BATCH), torch.arange(N).split(BATCH)))


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_falls(batches, name):
    """From the first to the last look at the same images; the teachers are another width than the student, `start` is
    the student.
    """
    # Random teachers' cosines have both signs, with which the published weights would push the student away from some.
    options = {"weighting": "confidence_sigmoid"} if name == "mmtard" else {}
    needs = set(METHODS[name](name=name).teachers) - {"start"}
    given = config.validate(
        {
            "run_dir": "unused",
            "student": {"weights": "random"},
            "teachers": {n: {"weights": "random"} for n in needs},
            "method": {"name": name, **options},
            "attack": {"eps": "4/255", "step_size": "2/255", "steps": 2},
            "data": {"shards": "unused", "lanes": 1},
            "train": {"steps": STEPS, "batch_size": BATCH},
        }
    )
    student = Plain(tower(0), lr=1e-3)
    teachers = {
        n: PlainTeacher(tower(0), head()) if n == "start" else PlainTeacher(tower(seed, 48, 24), head(24))
        for seed, n in enumerate(sorted(given.ensemble), 1)
    }
    step, losses = DistillationTask(given, student, head(), teachers), []
    for i in range(STEPS):
        loss, terms = step(*batches[i % len(batches)])
        student.backward(loss.mean())
        student.end_micro_batch(1e-3)
        step.end_step({k: v.mean().item() for k, v in terms.items()})
        losses.append(loss.mean().item() + (name == "sim_clip"))  # 1 - cosine, so that 0 is the least of every loss
    first, last = (np.mean(losses[i:][: len(batches)]) for i in (0, STEPS - len(batches)))
    assert 0 <= last < 0.9 * first
