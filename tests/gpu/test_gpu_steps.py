"""Five MMT-ARD steps on one GPU: those of plain PyTorch on the CPU, at each ZeRO stage, and what the host waits for."""

import warnings
from datetime import timedelta

import pytest
import torch
from parallel import five_steps

from mmtard.distributed.ranks import set_timeouts
from mmtard.models.image_tower import DTYPES
from mmtard.models.teachers import FrozenTeacher
from mmtard.seeding import sample_uniform
from mmtard.training.engine import Engine
from mmtard.training.numerics import numerics
from mmtard.zero_shot import ZeroShotHead

from .conftest import DEVICE, only_on_cuda

# A GPU adds in another order than a CPU. The attack takes signs, so that where a gradient is all but zero a pixel ends
# elsewhere, and AdamW's first updates are signs as well. Losses are relative; weights are the mean difference as a
# share of the way that five updates of full size go.
LOSS = {"float32": 1e-3, "bf16": 0.05}
WEIGHT = {"float32": 0.02, "bf16": 0.1}
FIRST_LOSS = {"float32": 1e-4, "bf16": 0.05}  # before any weight differs
WAY = five_steps.STEPS * five_steps.LR
WAITED = "synchronizing CUDA operation"  # in torch's warning


@pytest.fixture(scope="module")
def plain():
    """Plain PyTorch on the CPU, in float32."""
    return five_steps.plain()


def way_apart(a: dict, b: dict) -> float:
    total = sum((a[name].cpu() - b[name].cpu()).abs().sum().item() for name in b)
    return total / sum(weight.numel() for weight in b.values()) / WAY


def trained(ranks, case: str) -> dict:
    stage, placement, precision, micro = case.split("-")
    with numerics(five_steps.settings(int(stage), placement, precision, int(micro), DEVICE).engine):
        return five_steps.engine(ranks, case)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("stage", range(4))
def test_every_zero_stage_trains_as_plain_pytorch_on_the_cpu(gpu_ranks, plain, stage, precision):
    ours = trained(gpu_ranks, f"{stage}-sharded-{precision}-8")
    apart = way_apart(ours["weights"], plain["weights"])
    gaps = [abs(a / b - 1) for a, b in zip(ours["losses"], plain["losses"])]
    print(f"\nZeRO {stage}, {precision}: losses {max(gaps):.2g} apart, the first {gaps[0]:.2g}, weights {apart:.2g}")
    assert gaps[0] < FIRST_LOSS[precision] and max(gaps) < LOSS[precision] and apart < WEIGHT[precision]


def test_micro_batches_add_up_to_the_batch(gpu_ranks, plain):
    ours = trained(gpu_ranks, "2-replicated-float32-2")
    assert ours["losses"] == pytest.approx(plain["losses"], rel=LOSS["float32"])


@pytest.mark.parametrize("micro", [8, 2])
@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_reduced_on_a_stream_of_their_own_are_those_of_plain_pytorch(gpu_ranks, plain, stage, micro):
    """As between GPUs, in small buckets: the host does not wait for that stream, the update has to."""
    with five_steps.way("overlapped"):
        ours = trained(gpu_ranks, f"{stage}-replicated-float32-{micro}")
    assert ours["losses"] == pytest.approx(plain["losses"], rel=LOSS["float32"])
    assert way_apart(ours["weights"], plain["weights"]) < WEIGHT["float32"]


def test_random_starts_have_the_bits_of_the_cpu(gpu_ranks):
    seeds = torch.randint(-(2**62), 2**62, (8,))
    on_gpu = sample_uniform(seeds.to(gpu_ranks.device), (3, 16, 16))
    assert on_gpu.device.type == DEVICE and torch.equal(on_gpu.cpu(), sample_uniform(seeds, (3, 16, 16)))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_sharded_teacher_gives_the_bits_of_a_replicated_one(gpu_ranks, precision):
    cfg = five_steps.settings(2, "sharded", precision, 8, DEVICE)
    head = ZeroShotHead(five_steps.text().to(gpu_ranks.device), 20.0)
    images = next(five_steps.batches())[0].to(gpu_ranks.device)
    whole, shards = (
        FrozenTeacher("clean", spec, five_steps.tower(1), head, gpu_ranks, DTYPES[precision])
        for spec in (cfg.teachers["clean"].model_copy(update={"placement": "replicated"}), cfg.teachers["clean"])
    )
    assert torch.equal(whole(images).logits, shards(images).logits)
    for teacher in (whole, shards):
        x = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(teacher.differentiable(x).logits.square().sum(), x)
        assert gradient.isfinite().all() and (gradient != 0).any()


def test_deepspeeds_own_groups_wait_as_long_as_they_are_told_to(gpu_ranks):
    """NCCL takes the process down at its limit, which is 10 minutes for the groups that DeepSpeed makes itself."""
    engine = Engine(five_steps.settings(2, "replicated", "bf16", 8, DEVICE), five_steps.tower(0), gpu_ranks)
    set_timeouts(timedelta(minutes=47))
    group = engine.ds.optimizer.dp_process_group
    backend = group._get_backend(torch.device(DEVICE))
    assert backend.options._timeout == timedelta(minutes=47)


# Whether the gradient's norm is finite; and no more where there are other GPUs to reduce over.
@pytest.mark.parametrize(
    "stage, in_the_update, way", [(0, 1, ""), (1, 1, ""), (2, 1, ""), (1, 1, "overlapped"), (2, 1, "overlapped")]
)
def test_the_host_waits_for_nothing_in_attack_and_loss(gpu_ranks, stage, in_the_update, way):
    from mmtard.distillation.task import DistillationTask

    cfg = five_steps.settings(stage, "replicated", "bf16", 8, DEVICE)
    with five_steps.way(way):
        engine = Engine(cfg, five_steps.tower(0), gpu_ranks)
    head = ZeroShotHead(five_steps.text().to(DEVICE), 20.0)
    teachers = {
        name: FrozenTeacher(name, cfg.teachers[name], five_steps.tower(seed), head, gpu_ranks, torch.bfloat16)
        for seed, name in enumerate(("clean", "robust"), 1)
    }
    task = DistillationTask(cfg, engine, head, teachers)
    for batch in five_steps.batches():
        images, labels, seeds = (part.to(gpu_ranks.device) for part in batch)
        loss, inside = waits_of(lambda x=images, y=labels, s=seeds: task(x, y, s)[0])
        _, update = waits_of(lambda of=loss: (engine.backward(of.mean()), engine.end_micro_batch(1e-3)))
    # The last of the five steps: in the first, teachers are looked at once, and kernels are loaded.
    only_on_cuda("torch counts what waits for a GPU alone")
    print(f"\nZeRO {stage}: the host waited {len(inside)} times in attack and loss, {len(update)} times in the update")
    assert inside == [], inside
    assert len(update) == in_the_update, update


def waits_of(work):
    """(what the work gives, a line for each time the host waited for the device).

    Of `torch.cuda.synchronize` torch itself does not warn.
    """
    if DEVICE != "cuda":
        return work(), []
    with warnings.catch_warnings(record=True) as told, pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("always")
        patch.setattr(torch.cuda, "synchronize", lambda device=None: warnings.warn(WAITED, stacklevel=2))
        torch.cuda.set_sync_debug_mode("warn")
        try:
            found = work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in told if WAITED in str(w.message)]
    return found, [f"{w.filename}:{w.lineno}" for w in waits]


def test_the_count_of_waits_sees_a_read_and_a_wait_for_the_device(gpu_ranks):
    """The control of the test above."""
    x = torch.rand(4, device=gpu_ranks.device)
    _, waits = waits_of(lambda: (x.sum().item(), torch.cuda.synchronize()) if DEVICE == "cuda" else None)
    only_on_cuda("torch counts what waits for a GPU alone")
    assert len(waits) == 2
