"""Batch norm over the whole batch, view by view; two ranks and resume are in tests/parallel/test_students.py."""

import pytest
import torch
from torch import nn

from mmtard.config import Model, check_world, validate
from mmtard.errors import UserError
from mmtard.models import batch_norm, loading
from mmtard.models.batch_layout import BatchLayout
from mmtard.models.batch_norm import SyncedBatchNorm


@pytest.fixture
def pair():
    """torch's batch norm in float64 with statistics and gains of its own, and ours with the same, in training mode."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3).double()
    for p in (norm.weight.data, norm.bias.data, norm.running_mean):
        p.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm.train(), SyncedBatchNorm(norm, BatchLayout()).double().train()


def images(offset=0.0):
    return (
        torch.randn(4, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3 + offset
    ).requires_grad_(True)


def test_one_view_on_one_rank_is_torchs_batch_norm(ranks, pair):
    norm, ours = pair
    x, y = images(100.0), images(100.0)
    direction = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    a, b = norm(x), ours(y)
    torch.testing.assert_close(b, a)
    (a * direction).sum().backward()
    (b * direction).sum().backward()
    torch.testing.assert_close(y.grad, x.grad)
    torch.testing.assert_close((ours.weight.grad, ours.bias.grad), (norm.weight.grad, norm.bias.grad))
    assert ours.num_batches_tracked == 0
    ours.update_running()
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(ours, name), getattr(norm, name))


def test_each_view_has_its_own_statistics_and_the_running_ones_are_of_both(ranks, pair):
    norm, ours = pair
    clean, adversarial = images(), images(offset=7.0) * 2
    ours.layout.describe(8, torch.arange(4))
    out = ours(torch.cat([clean, adversarial]))
    before = norm.running_mean.clone(), norm.running_var.clone()
    torch.testing.assert_close(out[:4], norm(clean))
    torch.testing.assert_close(out[4:], norm(adversarial))
    ours.update_running()
    ours.update_running()  # there is nothing new
    both = torch.cat([clean, adversarial]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(ours.running_mean, 0.9 * before[0] + 0.1 * both.mean(1))
    torch.testing.assert_close(ours.running_var, 0.9 * before[1] + 0.1 * both.var(1))


def test_in_evaluation_it_is_the_running_statistics(pair):
    norm, ours = pair
    x = images()
    assert torch.equal(ours.eval()(x), norm.eval()(x))


def test_a_tower_trains_with_batch_statistics_only_when_it_is_told_to(resnet):
    tower = loading.load_clip(Model(arch=resnet, weights="random"), seed=1).tower()
    assert not any(m.training for m in tower.train().modules() if isinstance(m, nn.BatchNorm2d))
    names = tower.state_dict().keys()
    batch_norm.synchronise(tower.visual, tower.layout)
    tower.frozen_batch_norm = False
    norms = [m for m in tower.train().modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 3 + 4 * 4 and all(type(m) is SyncedBatchNorm and m.training for m in norms)
    assert tower.state_dict().keys() == names and not any(m.training for m in tower.eval().modules())


def test_what_does_not_fit_is_refused(vit, tree):
    tower = loading.load_clip(Model(arch=vit, weights="random")).tower()
    with pytest.raises(
        UserError, match="student.batch_norm: a VisionTransformer tower has no batch norm to synchronise"
    ):
        batch_norm.synchronise(tower.visual, tower.layout)
    with pytest.raises(UserError, match="'synced' knows no BatchNorm1d"):
        batch_norm.synchronise(nn.Sequential(nn.BatchNorm1d(2)), BatchLayout())
    tree["student"]["batch_norm"], tree["train"]["micro_batch_size"] = "synced", 4
    assert check_world(validate(tree), 2) == 1
    with pytest.raises(
        UserError, match="takes its statistics over the whole batch; let a rank take its 8 samples at once"
    ):
        check_world(validate(tree), 1)
