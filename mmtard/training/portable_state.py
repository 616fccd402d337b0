"""The state of a training as one portable set of tensors by parameter name, whatever the ZeRO stage and world size."""

from __future__ import annotations

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

from ..distributed.ranks import Ranks

MOMENTS, EMA = ("exp_avg", "exp_avg_sq"), "ema"


class PortableState:
    """Weights, AdamW's moments and the moving average of a DeepSpeed engine: gathered for a checkpoint, and restored
    from one.

    ema: the decay of the moving average of the weights; None where none is kept.
    """

    def __init__(self, ds, ranks: Ranks, zero_stage: int, ema: float | None):
        self.ds, self.ranks, self.stage, self.ema = ds, ranks, zero_stage, ema
        self._kept = (*MOMENTS, EMA) if ema else MOMENTS
        self._states = self._prepare()

    def gather(self) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
        """(trained weights and buffers, optimizer states as `exp_avg.<name>`, updates applied).

        CPU copies on the first rank, empty dicts elsewhere. The moving average, where one is kept, is the state `ema`.
        Collective: every rank calls it at the same place.
        """
        weights: dict[str, Tensor] = {}
        states: dict[str, Tensor] = {}
        for name, parameter in self._trained():
            self._keep(weights, name, self._weight(parameter))
            for key in self._kept:
                self._keep(states, f"{key}.{name}", self._optimizer_state(parameter, key))
        persistent = self.ds.module.state_dict().keys() if self.stage < 3 else _buffer_names(self.ds.module)
        for name, buffer in self.ds.module.named_buffers():
            if name in persistent:
                self._keep(weights, name, buffer)
        return weights, states, self.updates

    def restore(self, states: dict[str, Tensor], updates: int) -> None:
        """Set the optimizer's states and update count as `gather` gave them; the weights come with the tower.

        An average that was not kept so far begins with those weights.
        """
        for name, parameter in self._trained():
            for key in self._kept:
                if key == EMA and f"{key}.{name}" not in states:
                    continue
                value = states[f"{key}.{name}"].to(self.ranks.device)
                if self.stage == 0:
                    self._states[parameter][key].copy_(value)
                else:
                    safe_set_full_optimizer_state(parameter, value, key)
        for state in self._states.values():
            state["step"].fill_(updates)

    def move_average(self) -> None:
        """Move the average towards the weights after an update; nothing where none is kept."""
        if self.ema:
            for weights, state in self._states.items():
                state[EMA].lerp_(weights.detach(), 1 - self.ema)

    @property
    def updates(self) -> int:
        """Updates applied so far."""
        return int(next(iter(self._states.values()))["step"].item())

    def _prepare(self) -> dict[Tensor, dict[str, Tensor]]:
        """Make AdamW's state now: it would come with the first update, too late to restore or save a checkpoint
        before it.
        """
        zero = self.ds.optimizer
        if self.stage == 0:
            base, flat = zero, [parameter for _, parameter in self._trained()]
        else:
            base = zero.optimizer
            flat = zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        for p in flat:
            base.state[p] = {"step": torch.zeros((), device=p.device), **{key: torch.zeros_like(p) for key in MOMENTS}}
            if self.ema:
                # In the optimizer state, because ZeRO partitions and gathers every tensor of a parameter's shape there.
                base.state[p][EMA] = p.detach().clone()
        if self.stage in (1, 2):
            zero._lazy_init_hp_params_optimizer_state()
        return {p: base.state[p] for p in flat}

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.ds.module.named_parameters() if p.requires_grad]

    def _weight(self, parameter: nn.Parameter) -> Tensor:
        return parameter if self.stage == 0 else safe_get_full_fp32_param(parameter)

    def _optimizer_state(self, parameter: nn.Parameter, key: str) -> Tensor:
        return self._states[parameter][key] if self.stage == 0 else safe_get_full_optimizer_state(parameter, key)

    def _keep(self, into: dict[str, Tensor], name: str, value: Tensor) -> None:
        if self.ranks.is_first:
            into[name] = value.detach().to("cpu", copy=True).contiguous()


def _buffer_names(module: nn.Module) -> set[str]:
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, m in module.named_modules()
        for name in m._buffers
        if name not in m._non_persistent_buffers_set
    }
