"""How often the host waits for the device in a step: what is read of the device, by where it is read.

Counted on the CPU: `mmtard` on a pretended GPU, DeepSpeed by the numbers that it reads, the constants that it copies to
the device, and its waits for a device that it takes to have streams.
"""

import importlib.util
import inspect
import math
import traceback
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from deepspeed.runtime.zero import stage3, stage_1_and_2
from parallel import five_steps
from pretended_gpu import CUDA, PACKAGE, pretended_gpu
from test_pretended_gpu import a_batch, a_task, settings
from torch.utils._python_dispatch import TorchDispatchMode

from mmtard.data.samples import Batch
from mmtard.distillation.task import DistillationTask
from mmtard.models.teachers import FrozenTeacher
from mmtard.training.engine import NORM_MARK, Engine, end_reductions_without_waiting, mark_norms_without_waiting
from mmtard.training.step import optimizer_step
from mmtard.zero_shot import ZeroShotHead


class HostWaits(TorchDispatchMode):
    """Counts what makes the host wait, by file: numbers read of tensors, what `note` replaces.

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
def waits(ranks, monkeypatch):
    """The waits of a step on a CPU that DeepSpeed takes for a GPU: with streams, and far from the host."""
    from deepspeed.accelerator import get_accelerator

    found, tensor = HostWaits(), torch.tensor
    stream = mock.MagicMock(synchronize=found.note)
    as_a_gpu = {
        "synchronize": found.note,
        "resolves_data_dependency": lambda self: False,
        "is_synchronized_device": lambda self: False,
        "Stream": lambda self, *a, **k: stream,
        "current_stream": lambda self, *a: stream,
        "stream": lambda self, stream: nullcontext(),
    }
    for name, value in as_a_gpu.items():
        monkeypatch.setattr(type(get_accelerator()), name, value)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)

    def copied(*args, device=None, **kwargs):
        if device is not None:
            found.note()
        return tensor(*args, device=device, **kwargs)

    monkeypatch.setattr(torch, "tensor", copied)
    return found


@pytest.fixture
def batch():
    images = torch.randint(0, 255, (8, 3, 16, 16), dtype=torch.uint8)
    return Batch(images, torch.arange(8) % five_steps.CLASSES, torch.arange(8), torch.arange(8), [""] * 8)


IN_UTILS = "runtime/utils.py"


@pytest.mark.parametrize(
    "stage, clip, micro, ranks_to_reduce_over, places",
    [
        # Whether the norm is finite, and with grad_clip two constants.
        (0, None, 8, False, {"training/engine.py": 1}),
        (0, 1.0, 8, False, {"training/engine.py": 1, IN_UTILS: 2}),
        # Whether the norm is finite, and with grad_clip again for each of the two groups of weights.
        (1, None, 2, False, {IN_UTILS: 1}),
        (2, None, 2, False, {IN_UTILS: 1}),
        (2, 1.0, 8, False, {IN_UTILS: 3}),
        # Between GPUs no more.
        (1, None, 8, True, {IN_UTILS: 1}),
        (1, None, 2, True, {IN_UTILS: 1}),
        (2, None, 8, True, {IN_UTILS: 1}),
        (2, 1.0, 2, True, {IN_UTILS: 3}),
    ],
)
def test_attack_and_loss_wait_for_nothing_and_the_update_for_the_gradients_norm(
    ranks, batch, waits, monkeypatch, stage, clip, micro, ranks_to_reduce_over, places
):
    if ranks_to_reduce_over:
        monkeypatch.setattr(Engine, "_overlaps", lambda engine, stage: True)
    config = five_steps.settings(stage, "replicated", "float32", micro)
    config = config.model_copy(update={"train": config.train.model_copy(update={"grad_clip": clip})})
    engine, head = Engine(config, five_steps.tower(0), ranks), ZeroShotHead(five_steps.text(), 20.0)
    teachers = {
        name: FrozenTeacher(name, config.teachers[name], five_steps.tower(seed), head, ranks, torch.float32)
        for seed, name in enumerate(("clean", "robust"), 1)
    }
    task = DistillationTask(config, engine, head, teachers)
    for _ in range(3):  # in the first, teachers are looked at once; DeepSpeed's timer would begin with the third
        waits.places.clear()
        with waits:
            optimizer_step(task, engine, batch, 1e-4, ranks.device)
    assert waits.places == places


@pytest.mark.parametrize("fails", [False, True])
def test_what_follows_a_backward_waits_on_the_device_for_its_reductions(monkeypatch, fails):
    """In DeepSpeed's own end of a backward, where it would have waited for the device; nowhere else, nor afterwards."""
    from deepspeed.accelerator import get_accelerator

    calls, accelerator = [], get_accelerator()
    monkeypatch.setattr(type(accelerator), "synchronize", lambda self, device=None: calls.append("the host waits"))
    monkeypatch.setattr(type(accelerator), "current_stream", lambda self: SimpleNamespace(wait_stream=calls.append))

    def end():
        calls.append("reduced")
        get_accelerator().synchronize()
        calls.append("added up")
        if fails:
            raise RuntimeError("of DeepSpeed")

    optimizer = SimpleNamespace(independent_gradient_partition_epilogue=end, reduction_stream="their stream")
    end_reductions_without_waiting(optimizer)
    with pytest.raises(RuntimeError, match="of DeepSpeed") if fails else nullcontext():
        optimizer.independent_gradient_partition_epilogue()
    accelerator.synchronize()
    assert calls == ["reduced", "their stream", "added up", "the host waits"]


def test_deepspeed_waits_for_the_device_at_the_end_of_a_backward_alone():
    """The wait that is replaced, and that reductions are of the one stream: to be read anew where this fails."""
    end = inspect.getsource(stage_1_and_2.DeepSpeedZeroOptimizer.independent_gradient_partition_epilogue)
    assert end.count("synchronize()") == 1 and "get_accelerator().synchronize()" in end
    assert "stream = self.reduction_stream" in inspect.getsource(stage_1_and_2.DeepSpeedZeroOptimizer.average_tensor)


@pytest.mark.parametrize("module", [stage_1_and_2, stage3])
def test_an_invalid_norm_is_marked_as_deepspeed_marks_it(module):
    """A second copy of DeepSpeed's module, which nothing has changed, marks the same norms by the same number."""
    spec = importlib.util.find_spec("deepspeed.runtime.utils")
    untouched = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(untouched)
    mark_norms_without_waiting()
    mark, theirs_mark = getattr(module, NORM_MARK), getattr(untouched, NORM_MARK)
    norms = [torch.tensor(value) for value in (0.0, 3.5, math.inf, -math.inf, math.nan)]
    ours, theirs = [norm.clone() for norm in norms], [norm.clone() for norm in norms]
    for norm in ours:
        mark(norm, device=norm.device)
    for norm in theirs:
        theirs_mark(norm, device=norm.device)
    assert mark.__module__ == "mmtard.training.engine" and theirs_mark.__module__ == "deepspeed.runtime.utils"
    assert torch.equal(torch.stack(ours), torch.stack(theirs))
    assert torch.stack(ours).tolist() == [0.0, 3.5, -1.0, -1.0, -1.0]


@pytest.mark.parametrize("device, world, stages", [("cpu", 2, [3]), ("cuda", 1, [3]), ("cuda", 2, [1, 2, 3])])
def test_gradients_travel_during_the_backward_where_there_are_other_gpus(device, world, stages):
    engine = SimpleNamespace(ranks=SimpleNamespace(device=torch.device(device), world_size=world))
    assert [stage for stage in (1, 2, 3) if Engine._overlaps(engine, stage)] == stages


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
