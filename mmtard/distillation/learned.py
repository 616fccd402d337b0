"""What learns beside the student: linear maps between embeddings of two models, the multipliers of a bound.

They lie outside DeepSpeed, whole on every rank, and take their gradients from the same backward as the student. Their
weights and moments go into the checkpoint's optimizer file, as `learned.<module>.<parameter>`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

PREFIX = "learned"
MULTIPLIERS = f"{PREFIX}.bound.samples"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass
class LearnedPart:
    """A module, its learning rate, whether that follows the student's schedule, and the updates from step to step."""

    module: nn.Module
    lr: float
    scheduled: bool = True
    every: int = 1


class SampleMultipliers:
    """A multiplier >= 0 for each sample of the data, whole on every rank: it climbs by `lr` times the sample's excess.

    It starts at log 2, as a Softplus of 0 does.
    """

    def __init__(self, samples: int, lr: float, device: torch.device | str):
        self.values, self.lr = torch.full((samples,), math.log(2), device=device), lr
        self._excess = torch.zeros_like(self.values)

    def __call__(self, samples: Tensor) -> Tensor:
        """The multipliers of samples int64 [B] -> [B]."""
        return self.values[samples]

    def note(self, samples: Tensor, excess: Tensor) -> None:
        """Keep what each sample int64 [B] exceeds its bound by, [B], until the update."""
        self._excess.index_add_(0, samples, excess.to(self._excess.dtype))

    def update(self, applied: bool, reduce: Callable[[Tensor], None]) -> None:
        """Climb by what was noted on all ranks since the last update; not after a skipped one. Collective."""
        if applied:
            reduce(self._excess)
            self.values.add_(self._excess, alpha=self.lr).clamp_(min=0)
        self._excess.zero_()


class LearnedParts:
    """The modules of a run by name, each with its own AdamW without decay, and the samples' multipliers."""

    def __init__(self, parts: dict[str, LearnedPart] | None = None, samples: SampleMultipliers | None = None):
        self.parts, self.samples = parts or {}, samples
        self._optimizers = {
            name: torch.optim.AdamW(part.module.parameters(), lr=part.lr, weight_decay=0.0)
            for name, part in self.parts.items()
        }

    def __call__(self, name: str, z: Tensor) -> Tensor:
        """What the module of that name makes of [B,...,D]; the same where there is none."""
        return self.parts[name].module(z) if name in self.parts else z

    def update(self, update: int, applied: bool, share: float, reduce: Callable[[Tensor], None], world: int) -> None:
        """Step each module that is due after update `update` (0-based) of the student, with the ranks' mean gradient.

        applied: whether the student's update was; share: of its largest learning rate; reduce: sums a tensor over the
        ranks in place. Collective.
        """
        for name, part in self.parts.items():
            optimizer = self._optimizers[name]
            if applied and (update + 1) % part.every == 0:
                self._average_gradients(part.module, reduce, world)
                optimizer.param_groups[0]["lr"] = part.lr * (share if part.scheduled else 1.0)
                optimizer.step()
            optimizer.zero_grad()
        if self.samples is not None:
            self.samples.update(applied, reduce)

    def tensors(self) -> dict[str, Tensor]:
        """CPU copies of weights and moments, by name."""
        found = {}
        for key, parameter, state in self._parameters():
            found[key] = parameter
            found |= {f"{key}.{moment}": state[moment] for moment in MOMENTS if moment in state}
        if self.samples is not None:
            found[MULTIPLIERS] = self.samples.values
        return {key: value.detach().to("cpu", copy=True).contiguous() for key, value in found.items()}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go on from the `tensors` of a checkpoint; what was not there begins anew."""
        if self.samples is not None and MULTIPLIERS in tensors:
            self.samples.values.copy_(tensors[MULTIPLIERS])
        for key, parameter, state in self._parameters():
            if key not in tensors:
                continue
            parameter.copy_(tensors[key])
            for moment in MOMENTS:
                if f"{key}.{moment}" in tensors:
                    value = tensors[f"{key}.{moment}"].clone()
                    state[moment] = value if moment == "step" else value.to(parameter.device)

    def _parameters(self):
        for name, part in self.parts.items():
            for own, parameter in part.module.named_parameters():
                yield f"{PREFIX}.{name}.{own}", parameter, self._optimizers[name].state[parameter]

    @staticmethod
    def _average_gradients(module: nn.Module, reduce: Callable[[Tensor], None], world: int) -> None:
        parameters = list(module.parameters())
        flat = torch.cat([p.grad.flatten() for p in parameters])
        reduce(flat)
        for p, mean in zip(parameters, (flat / world).split([p.numel() for p in parameters])):
            p.grad = mean.view_as(p)


def projection(source: int, target: int, seed: int, name: str) -> nn.Linear:
    """A linear map [B,...,source] -> [B,...,target] that starts orthogonal: the same bits on every rank."""
    return _seeded(lambda: _orthogonal(nn.Linear(source, target, bias=False)), seed, name)


def multipliers(source: int, hidden: int, seed: int) -> nn.Sequential:
    """LORE's network of two layers, [B,source] -> multipliers [B,1] >= 0."""
    return _seeded(
        lambda: nn.Sequential(nn.Linear(source, hidden), nn.ReLU(), nn.Linear(hidden, 1), nn.Softplus()), seed, "bound"
    )


def _orthogonal(linear: nn.Linear) -> nn.Linear:
    nn.init.orthogonal_(linear.weight)
    return linear


def _seeded(make, seed: int, name: str):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(f"{seed} {PREFIX} {name}".encode()))
        return make()
