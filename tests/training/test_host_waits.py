"""How often the host waits for the device in a step: what is read of the device, by where it is read.

The published step waits 23 times (PGD-10, one micro-batch): DeepSpeed's timer in each forward of the module, the
losses, and each term alone. Counted on the CPU: `mmtard` on a pretended GPU, DeepSpeed by the numbers that it reads.
"""

import traceback
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from parallel import five_steps
from pretended_gpu import CUDA, PACKAGE, pretended_gpu
from test_pretended_gpu import a_batch, a_task, settings
from torch.utils._python_dispatch import TorchDispatchMode

from mmtard.data.samples import Batch
from mmtard.distillation.task import DistillationTask
from mmtard.models.teachers import FrozenTeacher
from mmtard.training.engine import Engine
from mmtard.training.step import optimizer_step
from mmtard.zero_shot import ZeroShotHead


class HostReads(TorchDispatchMode):
    """Counts the numbers that the host reads of tensors, by file, and DeepSpeed's own waits for the whole device.

    Not those of torch's optimizer: AdamW keeps its count of steps on the CPU, also beside a GPU.
    """

    def __init__(self):
        super().__init__()
        self.places: Counter[str] = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.__name__.partition(".")[0] in ("_local_scalar_dense", "nonzero", "equal"):
            self.note()
        return operation(*args, **(kwargs or {}))

    def note(self, *_) -> None:
        files = [frame.filename for frame in traceback.extract_stack()]
        if not any("/torch/optim/" in name for name in files):
            own = [name for name in files if name.startswith(PACKAGE) or "/deepspeed/" in name]
            self.places[own[-1].removeprefix(PACKAGE).rpartition("/deepspeed/")[2] if own else "?"] += 1


@pytest.fixture
def batch():
    images = torch.randint(0, 255, (8, 3, 16, 16), dtype=torch.uint8)
    return Batch(images, torch.arange(8) % five_steps.CLASSES, torch.arange(8), torch.arange(8), [""] * 8)


@pytest.mark.parametrize(
    "stage, clip, places",
    [
        (0, None, {"training/engine.py": 1}),
        (2, None, {"runtime/utils.py": 1}),
        (2, 1.0, {"runtime/utils.py": 3}),
    ],
)
def test_attack_and_loss_read_nothing_and_the_update_the_gradients_norm(ranks, batch, monkeypatch, stage, clip, places):
    from deepspeed.accelerator import get_accelerator

    config = five_steps.settings(stage, "replicated", "float32", 8)
    config = config.model_copy(update={"train": config.train.model_copy(update={"grad_clip": clip})})
    engine, head = Engine(config, five_steps.tower(0), ranks), ZeroShotHead(five_steps.text(), 20.0)
    teachers = {
        name: FrozenTeacher(name, config.teachers[name], five_steps.tower(seed), head, ranks, torch.float32)
        for seed, name in enumerate(("clean", "robust"), 1)
    }
    task = DistillationTask(config, engine, head, teachers)
    for _ in range(3):  # DeepSpeed's timer began with the third step; in the first, teachers are looked at once
        reads = HostReads()
        monkeypatch.setattr(type(get_accelerator()), "synchronize", reads.note)
        with reads:
            optimizer_step(task, engine, batch, 1e-4, ranks.device)
    assert reads.places == places


def test_the_numbers_of_a_step_are_read_in_one_wait_and_bad_samples_where_there_are_any(ranks):
    """All ranks' sums, counts, weights and the gradient's norm at once; samples without a finite loss, when asked."""
    update = SimpleNamespace(applied=True, grad_norm=torch.ones(()))
    with pretended_gpu() as gpu:
        task = a_task(settings({"name": "mmtard", "cross_modal_weight": 1.0}), ranks)
        engine = task.student
        engine.backward, engine.end_micro_batch = lambda loss: loss.backward(), lambda lr: update
        engine.ds.train_micro_batch_size_per_gpu = lambda: 2
        batch = a_batch()
        optimizer_step(task, engine, batch, 1e-4, CUDA)  # looks at the teachers' embeddings, once
        gpu.waits.clear()
        outcome = optimizer_step(task, engine, batch, 1e-4, CUDA)
        assert not gpu.waits
        assert outcome.bad_samples(batch) == []
        outcome.terms.total([1.0, 2.0], SimpleNamespace(gather_numbers=lambda numbers: numbers[None]))
    places = Counter(wait.rpartition(" at ")[2].partition(":")[0] for wait in gpu.waits.elements())
    assert places == {"training/step.py": 1, "training/step_terms.py": 1}
