import pytest
import torch
from open_clip.transformer import VisionTransformer

from mmtard.config import Attack, Model
from mmtard.distillation.attack_objectives import find_objective
from mmtard.distillation.methods import Pass
from mmtard.models.image_tower import ImageTower
from mmtard.models.loading import load_skeleton
from mmtard.training import throughput
from mmtard.training.throughput import cost, forward_flops, forward_flops_of, peak_flops, sample_flops


def test_models_of_one_architecture_are_counted_once(vit, resnet, monkeypatch):
    clips = {
        name: load_skeleton(Model(arch=arch, weights="random"), name)
        for name, arch in {"student": vit, "clean": resnet, "robust": vit}.items()
    }
    expected, counted = {name: forward_flops(clip.tower()) for name, clip in clips.items()}, []
    monkeypatch.setattr(throughput, "forward_flops", lambda tower: counted.append(tower) or forward_flops(tower))
    assert forward_flops_of(clips) == expected and expected["student"] != expected["clean"] and len(counted) == 2


def test_forward_flops_are_those_counted_by_hand():
    width, layers, patches, mlp, out = 32, 2, 16, 64, 8
    visual = VisionTransformer(
        image_size=32, patch_size=8, width=width, layers=layers, heads=2, mlp_ratio=mlp / width, output_dim=out
    )
    tokens = patches + 1
    embed = patches * 3 * 8 * 8 * width
    block = tokens * width * 3 * width + 2 * tokens * tokens * width + tokens * width * width + 2 * tokens * width * mlp
    # Of the last block's output, the class token alone is read: it needs all keys and values, and one of all else.
    last = tokens * width * 2 * width + width * width + 2 * tokens * width + width * width + 2 * width * mlp
    by_hand = 2 * (embed + (layers - 1) * block + last + width * out)  # a multiply-add is two
    assert forward_flops(ImageTower(visual, (0.5,) * 3, (0.2,) * 3)) == pytest.approx(by_hand, rel=0.01)


def test_a_training_sample_is_the_sum_of_its_passes():
    attack = Attack(steps=10)
    mmtard = {Pass("student", "adv"), Pass("student", "clean"), Pass("robust", "adv"), Pass("clean", "clean")}
    forward = {"student": 1, "clean": 100, "robust": 1000}
    # two differentiated student passes, ten attack steps, one pass of each teacher (the attack's target is asked
    # anyway)
    assert sample_flops(forward, mmtard, find_objective("kl_clean"), attack) == 6 + 20 + 1100
    assert sample_flops({"student": 1}, {Pass("student", "clean")}, None, attack) == 3
    assert sample_flops({"student": 1}, {Pass("student", "clean")}, None, attack, adapters=True) == 2
    own = {Pass("student", "adv"), Pass("student", "clean")}
    for passes in ({Pass("student", "adv")}, own):  # the target of kl_self is a pass of its own, in evaluation mode
        assert (
            sample_flops({"student": 1}, passes, find_objective("kl_self"), Attack(steps=4, algorithm="apgd"))
            == 3 * len(passes) + 1 + 10
        )
    # a robust teacher on the clean image as well; both teachers fused
    assert sample_flops(forward, mmtard, find_objective("kl_robust"), attack) == 6 + 20 + 1100 + 1000
    assert (
        sample_flops(forward, mmtard, find_objective("kl_fused", {"clean": 0.5, "robust": 0.5}), attack)
        == 6 + 20 + 1100 + 1000
    )


def test_the_attacks_gradient_through_a_teacher_and_its_restarts_count():
    passes, forward = {Pass("student", "adv"), Pass("robust", "adv")}, {"student": 1, "robust": 1000}
    assert sample_flops(forward, passes, find_objective("kl_adaptive"), Attack(steps=10)) == 3 + 1000 + 20 * 1001
    # three attacks of ten steps, and a look at what each reached
    assert sample_flops(forward, passes, find_objective("ce"), Attack(steps=10, restarts=3)) == 3 + 1000 + 3 * 20 + 3


def test_the_peak_of_an_unknown_device_is_not_guessed():
    assert peak_flops(torch.device("cpu"), "bf16") is None


@pytest.mark.parametrize(
    "name, bf16, float32",
    [
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA A100 80GB PCIe", 312, 19.5),
        ("NVIDIA H100 80GB HBM3", 989, 67),
        ("NVIDIA H100 PCIe", 756, 51),
        ("NVIDIA H100 NVL", 835, 60),
        ("NVIDIA H200", 989, 67),
        ("NVIDIA H200 NVL", 835, 60),
        ("NVIDIA GH200 480GB", 989, 67),
        ("NVIDIA B200", 2250, 75),
        ("NVIDIA GB200", 2500, 80),
        ("NVIDIA RTX A1000", None, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
        ("NVIDIA GeForce RTX 4090", None, None),
    ],
)
def test_the_peak_is_that_of_the_very_model_and_precision(monkeypatch, name, bf16, float32):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    for precision, tera in (("bf16", bf16), ("float32", float32)):
        assert peak_flops(torch.device("cuda", 0), precision) == (tera and tera * 1e12)


def test_memory_is_what_tensors_took_and_what_the_gpu_had_to_hold_for_them(monkeypatch):
    asked = []
    for name, gib in (("max_memory_allocated", 6), ("max_memory_reserved", 7)):
        monkeypatch.setattr(torch.cuda, name, lambda device, gib=gib: gib * 2**30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", asked.append)
    device = torch.device("cuda", 0)
    columns = cost(2.0, images=4, flops=1e12, peak=1e13, world_size=2, device=device)
    assert columns == {
        "seconds": 2.0, "images_per_s": 2.0, "tflops_a_rank": 1.0, "mfu": 0.1, "memory_gib": 6.0, "reserved_gib": 7.0
    }  # fmt: skip
    assert asked == [device]
