"""Classifiers that are neither robust nor hopeless, for attacks to be judged on."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmtard.attacks.threat_model import project

CLASSES = 10


def train(net, images, labels, eps, steps, batch_size=128, lr=3e-3):
    """Adversarial training by single large steps (Goodfellow et al. 2015), with a learning rate that falls to zero."""
    optimizer = torch.optim.Adam(net.parameters(), lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    rng = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(images), (batch_size,), generator=rng)
        x, y = images[rows], labels[rows]
        probe = x.clone().requires_grad_()
        gradient = torch.autograd.grad(F.cross_entropy(net(probe), y), probe)[0]
        optimizer.zero_grad()
        F.cross_entropy(net(project(x + eps * gradient.sign(), x, "linf", eps)), y).backward()
        optimizer.step()
        schedule.step()
    return net.eval().requires_grad_(False)


def convolutions(width, size, blocks, out=CLASSES):
    layers, channels = [], 3
    for _ in range(blocks):
        layers += [nn.Conv2d(channels, width, 3, 2, 1), nn.GELU()]
        channels, size = width, size // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * size**2, out))


class Double(nn.Module):
    """Float32 in and out, float64 within: another batch size sums in another order, and rounding hides it."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x.double()).float()


@pytest.fixture(scope="session")
def victim():
    """A small network trained on noisy patterns, and 100 samples that it gets right; half of them stand at `eps`."""
    torch.manual_seed(0)
    patterns = F.interpolate(torch.randn(CLASSES, 3, 4, 4, dtype=torch.float64), size=12, mode="bilinear")

    def draw(n, seed):
        rng = torch.Generator().manual_seed(seed)
        labels = torch.randint(CLASSES, (n,), generator=rng)
        return (
            0.5 + 0.1 * patterns[labels] + 0.15 * torch.randn(n, 3, 12, 12, generator=rng, dtype=torch.float64)
        ).clamp(0, 1), labels

    net = train(convolutions(16, 12, 2).double(), *draw(2000, 1), eps=8 / 255, steps=100)
    images, labels = draw(400, 2)
    images = images.float()
    model = Double(net)
    rows = (model(images).argmax(1) == labels).nonzero().flatten()[:100]
    assert len(rows) == 100
    return SimpleNamespace(
        net=net, model=model, images=images[rows], labels=labels[rows], seeds=torch.arange(1000, 1100), eps=11 / 255
    )
