import math

import pytest
import torch
from open_clip.transformer import VisionTransformer

from mmtard.config import Train
from mmtard.models.image_tower import ImageTower
from mmtard.training.optimizer import learning_rate, parameter_groups


def test_learning_rate_warms_up_linearly_and_falls_to_zero_as_a_cosine():
    train = Train(steps=5000, batch_size=1, lr=2e-5, warmup_steps=350)
    rates = [learning_rate(t, train) for t in range(5001)]
    assert (
        rates[0] == pytest.approx(2e-5 / 350) and rates[174] == pytest.approx(1e-5) and rates[349] == rates[350] == 2e-5
    )
    assert rates[2675] == pytest.approx(1e-5)  # half-way between 350 and 5000
    assert rates[5000] == pytest.approx(0, abs=1e-20)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-5)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4650)
    for t in range(350, 5000):
        assert math.isclose(rates[t], optimizer.param_groups[0]["lr"], rel_tol=1e-6, abs_tol=1e-15)
        optimizer.step()
        cosine.step()


def test_learning_rate_without_warm_up_starts_at_its_peak():
    assert learning_rate(0, Train(steps=10, batch_size=1, lr=1e-3)) == 1e-3


@pytest.mark.parametrize("steps,warmup,pct_start", [(100, 0, 0.3), (50, 20, 21 / 50)])
def test_one_cycle_is_that_of_torch(steps, warmup, pct_start):
    train = Train(steps=steps, batch_size=1, lr=4e-3, warmup_steps=warmup, schedule="onecycle")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=4e-3, total_steps=steps, pct_start=pct_start, cycle_momentum=False
    )
    for t in range(steps):
        assert math.isclose(learning_rate(t, train), optimizer.param_groups[0]["lr"], rel_tol=1e-9)
        optimizer.step()
        if t < steps - 1:
            cycle.step()
    assert max(learning_rate(t, train) for t in range(steps)) == pytest.approx(4e-3, rel=1e-3)


def test_one_cycle_of_a_single_step_has_the_largest_rate():
    assert learning_rate(0, Train(steps=1, batch_size=1, lr=1e-3, schedule="onecycle")) == 1e-3


def test_one_cycle_has_a_rate_for_every_step_of_every_short_run():
    for steps in range(1, 41):
        for warmup in range(steps + 1):
            train = Train(steps=steps, batch_size=1, lr=1.0, warmup_steps=warmup, schedule="onecycle")
            assert all(0 < learning_rate(t, train) <= 1 for t in range(steps)), (steps, warmup)


def test_decay_is_on_matrices_alone_and_every_weight_is_trained_once():
    visual = VisionTransformer(image_size=16, patch_size=8, width=32, layers=1, heads=2, mlp_ratio=2, output_dim=16)
    tower = ImageTower(visual, (0.5,) * 3, (0.2,) * 3)
    decayed, rest = parameter_groups(tower, 0.1)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in tower.named_parameters()}
    assert sorted(names.values()) == sorted(names[id(p)] for group in (decayed, rest) for p in group["params"])
    plain = {names[id(p)] for p in rest["params"]}
    assert {n for n in names.values() if n.endswith("bias") or ".ln_" in n} <= plain
    assert not {n for n in plain if n.endswith(("conv1.weight", "in_proj_weight", "c_fc.weight", "visual.proj"))}


def test_frozen_weights_are_in_no_group():
    tower = ImageTower(VisionTransformer(16, 8, 32, 1, 2, 2, output_dim=16), (0.5,) * 3, (0.2,) * 3)
    tower.visual.conv1.requires_grad_(False)
    assert all(p is not tower.visual.conv1.weight for g in parameter_groups(tower, 0.1) for p in g["params"])
