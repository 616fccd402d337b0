"""A whole step, its agreement and report included: the host reads of the device twice, whatever was applied."""

import traceback
from types import SimpleNamespace

import pytest
import torch
from open_clip.transformer import VisionTransformer

from mmtard.config import validate
from mmtard.data.samples import Batch
from mmtard.distillation.task import DistillationTask
from mmtard.models.image_tower import ImageTower
from mmtard.runs.metrics import SilentLogger
from mmtard.training.record import StepRecord
from mmtard.training.step import optimizer_step
from mmtard.zero_shot import ZeroShotHead


@pytest.fixture
def reads(monkeypatch):
    """The reads of floating-point and boolean tensors. Seeds and sample ids, which are integers, stay on the host, and
    so does the count of steps that AdamW reads on a CPU; on a GPU it is fused and reads nothing.
    """
    found = []

    def counted(name):
        original = getattr(torch.Tensor, name)

        def read(self, *args, **kwargs):
            of_adamw = any("/torch/optim/" in frame.filename for frame in traceback.extract_stack())
            if self.dtype != torch.int64 and not of_adamw:
                found.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, read)

    for name in ("item", "tolist", "cpu", "__bool__", "__float__"):
        counted(name)
    return found


@pytest.mark.parametrize("stage", [0, 2])
def test_a_step_reads_twice_whether_it_was_applied_and_all_its_numbers(ranks, stage, reads):
    from mmtard.training.engine import Engine

    config = validate(
        {
            "run_dir": "r",
            "student": {"weights": "random"},
            "method": {"name": "trades"},
            "data": {"shards": "s", "lanes": 4},
            "attack": {"steps": 3},
            "train": {"steps": 9, "batch_size": 4, "micro_batch_size": 2},
            "engine": {"precision": "float32", "zero_stage": stage},
        }
    )
    visual = VisionTransformer(image_size=16, patch_size=8, width=32, layers=1, heads=2, mlp_ratio=2, output_dim=16)
    engine = Engine(config, ImageTower(visual, [0.5] * 3, [0.5] * 3), ranks)
    head = ZeroShotHead(torch.nn.functional.normalize(torch.randn(5, 16), dim=-1), 10.0)
    task = DistillationTask(config, engine, head, {})
    record = StepRecord(SimpleNamespace(name=str), ranks, SilentLogger(), 4, {})
    ids = torch.arange(4)
    batch = Batch(torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8), ids % 5, ids, ids + 7, [""] * 4)
    for _ in range(3):
        reads.clear()
        done = optimizer_step(task, engine, batch, 1e-3, ranks.device)
        launched = len(reads)
        agreed = record.agree(done, batch, stop=False)
        record.report(1, agreed, done, batch)
        assert launched <= 1 and len(reads) <= 2, reads
        assert agreed.update.applied and type(agreed.update.grad_norm) is float and agreed.update.grad_norm > 0
        assert agreed.bad == 0 and agreed.means["loss"] > 0 and "bad samples" not in agreed.means
