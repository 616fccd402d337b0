"""How exactly a training computes: TF32, deterministic kernels, and how often the host waits for the device."""

import os
from types import SimpleNamespace

import pytest
import torch
from open_clip.transformer import VisionTransformer

from mmtard.attacks.pgd import pgd
from mmtard.config import validate
from mmtard.models.image_tower import ImageTower
from mmtard.training.numerics import numerics

KINDS = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)


def precisions():
    return [kind.fp32_precision for kind in KINDS]


def test_float32_means_float32_while_it_trains_and_bf16_leaves_all_as_it_was():
    before = precisions()
    with numerics(SimpleNamespace(precision="float32", deterministic=False)):
        assert precisions() == ["ieee", "ieee"]
    with numerics(SimpleNamespace(precision="bf16", deterministic=False)):
        assert precisions() == before
    assert precisions() == before


def test_settings_made_through_torchs_newer_interface_do_not_get_in_the_way():
    before, torch.backends.cuda.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision, "tf32"
    try:
        with numerics(SimpleNamespace(precision="float32", deterministic=False)):
            assert precisions() == ["ieee", "ieee"]
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_deterministic_kernels_are_asked_for_and_given_back(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with numerics(SimpleNamespace(precision="bf16", deterministic=True)):
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with numerics(SimpleNamespace(precision="bf16", deterministic=True)):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.parametrize("stage", [0, 2])
def test_no_forward_of_a_step_waits_for_the_device(ranks, stage, monkeypatch):
    """DeepSpeed's throughput timer did at every forward of the module, so at each of the attack's steps."""
    from deepspeed.accelerator import get_accelerator

    from mmtard.training.engine import Engine

    config = validate(
        {
            "run_dir": "r",
            "student": {"weights": "random"},
            "method": {"name": "tecoa"},
            "data": {"shards": "s", "lanes": 4},
            "train": {"steps": 9, "batch_size": 4},
            "engine": {"precision": "float32", "zero_stage": stage},
        }
    )
    visual = VisionTransformer(image_size=16, patch_size=8, width=32, layers=1, heads=2, mlp_ratio=2, output_dim=16)
    engine = Engine(config, ImageTower(visual, [0.5] * 3, [0.5] * 3), ranks)
    waits = []
    monkeypatch.setattr(type(get_accelerator()), "synchronize", lambda *args: waits.append(args))
    for _ in range(4):  # the timer began with the third step
        images, seeds = torch.rand(4, 3, 16, 16), torch.arange(4)
        with engine.attack_forward() as forward:
            loss = lambda x: forward(x).square().sum(1)
            adv = pgd(loss, images, norm="linf", eps=2 / 255, step_size=1 / 255, steps=10, seeds=seeds)
        engine.backward(engine(torch.cat([images, adv]), seeds).square().mean())
        engine.end_micro_batch(1e-4)
    assert waits == []


@pytest.mark.parametrize("attack_copy", [True, False])
@pytest.mark.parametrize("checkpoint_attack", [True, False])
def test_an_attack_step_computes_activations_again_only_where_it_is_asked_to(ranks, attack_copy, checkpoint_attack):
    from mmtard.models import student
    from mmtard.training.engine import Engine

    engine = {"attack_copy": attack_copy, "checkpoint_attack": checkpoint_attack, "checkpoint_activations": True}
    config = validate(
        {
            "run_dir": "r",
            "student": {"weights": "random"},
            "method": {"name": "tecoa"},
            "data": {"shards": "s", "lanes": 4},
            "train": {"steps": 9, "batch_size": 4},
            "engine": {"precision": "float32", "zero_stage": 0, **engine},
        }
    )
    visual = VisionTransformer(image_size=16, patch_size=8, width=32, layers=2, heads=2, mlp_ratio=2, output_dim=16)
    tower = ImageTower(visual, [0.5] * 3, [0.5] * 3)
    student.checkpoint_activations(tower)
    engine, calls = Engine(config, tower, ranks), []
    images = torch.rand(2, 3, 16, 16, requires_grad=True)
    with engine.attack_forward() as forward:
        attacked = engine.attack_copy.tower if attack_copy else tower
        attacked.visual.transformer.resblocks[0].mlp.c_fc.register_forward_hook(lambda *_: calls.append(1))
        torch.autograd.grad(forward(images).sum(), images)
    assert len(calls) == (2 if checkpoint_attack else 1)
    assert (engine.attack_copy is not None) == attack_copy
    calls.clear()
    tower.visual.transformer.resblocks[0].mlp.c_fc.register_forward_hook(lambda *_: calls.append(1))
    engine.backward(engine(images.detach(), torch.arange(2)).sum())
    assert len(calls) >= 2  # in training, it still does
