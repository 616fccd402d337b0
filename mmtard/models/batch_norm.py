"""Batch norm with the statistics of the whole global batch, each view of it (clean, adversarial) by its own.

torch's SyncBatchNorm works on GPUs alone and would mix the views, whose statistics differ (Xie et al., CVPR 2020,
AdvProp).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..distributed import ranks
from ..errors import UserError
from .batch_layout import BatchLayout


class SyncedBatchNorm(nn.BatchNorm2d):
    """Batch norm that normalises each view by its own mean and variance over the samples of all ranks.

    x [V*B,C,H,W], V views of B samples a rank. In evaluation, and so in the attack, the running statistics are used,
    which `update_running` moves.
    """

    def __init__(self, of: nn.BatchNorm2d, layout: BatchLayout):
        super().__init__(of.num_features, of.eps, of.momentum, device=of.weight.device, dtype=of.weight.dtype)
        self.load_state_dict(of.state_dict())
        self.layout = layout
        self.seen: tuple[Tensor, Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [V*B,C,H,W] -> the same shape; collective in training, where the ranks' statistics meet."""
        if not self.training:
            return super().forward(x)
        y, *self.seen = _Normalise.apply(x, self.weight, self.bias, self.running_mean, self.eps, self.layout.groups)
        return y

    def update_running(self) -> None:
        """Move the running statistics to those of the last forward in training, all its views taken together."""
        if self.seen is None:
            return
        mean, var, n = self.seen
        pooled = var.mean(0) + mean.var(0, correction=0)
        n = n * len(mean)
        self.running_mean.lerp_(mean.mean(0), self.momentum)
        self.running_var.lerp_(pooled * n / (n - 1), self.momentum)  # unbiased, as torch keeps it
        self.num_batches_tracked += 1
        self.seen = None


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias, differentiated through the statistics of all ranks.

    Also returns mean and var [V,C] and the samples they are over. Arithmetic is float32 at least; what is kept for
    the backward is x itself.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, shift, eps, count):
        """x [V*B,C,H,W] of `count` views -> (normalised x, mean [V,C], var [V,C], samples). Collective."""
        values = _by_view(x, count)
        off = values - shift[:, None, None]  # near the mean already: their squares lose no digits
        sums = torch.stack([off.sum((1, 3, 4)), off.square().sum((1, 3, 4))])
        total = torch.cat([sums.flatten(), sums.new_full((1,), values[0, :, 0].numel())])
        ranks.reduce(total)
        n = total[-1]
        first, second = total[:-1].view_as(sums) / n
        mean, var = shift + first, (second - first.square()).clamp_min(0)
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt(), n)
        scaled = _standardised(values, mean, (var + eps).rsqrt()) * weight[:, None, None]
        ctx.mark_non_differentiable(mean, var, n)
        return (scaled.flatten(0, 1) + bias[:, None, None]).to(x.dtype), mean, var, n

    @staticmethod
    def backward(ctx, dy, *_):
        """dy, of the shape of x -> the gradients of x, weight and bias. Collective."""
        x, weight, mean, rstd, n = ctx.saved_tensors
        g, normalised = _by_view(dy, len(mean)), _standardised(_by_view(x, len(mean)), mean, rstd)
        sums = torch.stack([g.sum((1, 3, 4)), (g * normalised).sum((1, 3, 4))])
        dbias, dweight = sums.sum(1).to(weight.dtype)
        ranks.reduce(sums)
        g_mean, gx_mean = (sums / n)[:, :, None, :, None, None]
        dx = (weight * rstd)[:, None, :, None, None] * (g - g_mean - normalised * gx_mean)
        return dx.to(x.dtype).flatten(0, 1), dweight, dbias, None, None, None


def _by_view(x: Tensor, count: int) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(0, (count, -1))


def _standardised(values: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return (values - mean[:, None, :, None, None]) * rstd[:, None, :, None, None]


def synchronise(visual: nn.Module, layout: BatchLayout) -> None:
    """Make every batch norm of an image tower a SyncedBatchNorm.

    Raises UserError for a tower with none, or with other kinds.
    """
    found = {name: m for name, m in visual.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    if not found:
        raise UserError(
            f"student.batch_norm: a {type(visual).__name__} tower has no batch norm to synchronise; leave it out"
        )
    for name, module in found.items():
        if type(module) is not nn.BatchNorm2d:
            raise UserError(f"student.batch_norm: 'synced' knows no {type(module).__name__} ({name}); leave it frozen")
        visual.set_submodule(name, SyncedBatchNorm(module, layout))


def is_synced(tower: nn.Module) -> bool:
    """Whether a tower has a SyncedBatchNorm."""
    return any(isinstance(module, SyncedBatchNorm) for module in tower.modules())


def update_running(tower: nn.Module) -> None:
    """Move the running statistics of every SyncedBatchNorm in a tower; once a step, when it was applied."""
    for module in tower.modules():
        if isinstance(module, SyncedBatchNorm):
            module.update_running()
