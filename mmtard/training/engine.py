"""The student under DeepSpeed ZeRO 0-3: autocast, the forward of the attack, one optimisation step."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns otherwise that it found nothing better.

import deepspeed
import deepspeed.ops
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import stage3, stage_1_and_2
from deepspeed.utils import logger
from torch import Tensor

from ..attacks.fused import Fusion, fused
from ..config import Config, check_world
from ..distributed.ranks import Ranks
from ..models import batch_norm
from ..models.attack_copy import AttackCopy
from ..models.compiled import compile_tower, wants_compiling
from ..models.image_tower import ImageTower
from ..models.student import keeping_activations
from .optimizer import bucket_size, parameter_groups
from .portable_state import PortableState

GATHERED_AT_ONCE = 50_000_000  # weights that ZeRO-3 gathers together for the attack's copy
NORM_MARK = "mask_nan_or_inf_with_val_inplace"  # DeepSpeed's, of a gradient's norm that is not finite


@dataclass(frozen=True)
class UpdateResult:
    """What an optimisation step did."""

    applied: bool  # False: the gradient was not finite, and nothing changed
    grad_norm: float | Tensor  # global L2 norm before clipping; a tensor is not read yet


class Engine:
    """An ImageTower trained by AdamW under ZeRO; exactly one call for each `backward`.

    The attack must use `attack_forward`, never the call: DeepSpeed's forward is armed for a backward, and under stage
    3 an attack through it ends in silently wrong weights.
    """

    def __init__(self, config: Config, tower: ImageTower, ranks: Ranks):
        if ranks.device.type == "cpu":
            # Would compile an extension for minutes; only inference_all_reduce uses it.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        logger.setLevel(logging.ERROR)
        mark_norms_without_waiting()
        deepspeed.init_distributed(auto_mpi_discovery=False, dist_init_required=False)
        self.ranks = ranks
        self.accumulation = check_world(config, ranks.world_size)
        self.elements = sum(p.numel() for p in tower.parameters() if p.requires_grad)
        tower.autocast = torch.bfloat16 if config.engine.precision == "bf16" else None
        tower.to(ranks.device)
        self.checkpoint_attack = config.engine.checkpoint_attack
        self.attacks = bool(config.attack_objective)
        self.attack_copy = self._attack_copy(config, tower)
        self._fusion: Fusion | None = None  # of the attack's arithmetic, where towers are compiled
        self.ds, *_ = deepspeed.initialize(
            model=tower,
            optimizer=torch.optim.AdamW(
                parameter_groups(tower, config.train.weight_decay),
                lr=config.train.lr,
                betas=config.train.betas,
                # One pass over the weights. Not on a CPU, whose vectors and their rests round otherwise, so that a
                # weight's last bit would depend on where ZeRO cuts.
                fused=ranks.device.type == "cuda",
            ),
            config=self._deepspeed_config(config),
        )
        self.stage = config.engine.zero_stage
        if self.stage in (1, 2) and self._overlaps(self.stage):
            end_reductions_without_waiting(self.ds.optimizer)
        self.portable = PortableState(self.ds, ranks, self.stage, config.train.ema)
        self._copy_is_old = True
        if self.attack_copy:
            self.attack_copy.follow(self.ds.module, whole=self.stage < 3)

    def compile(self, setting: str, say: Callable[[str], None]) -> None:
        """Let the attack, and the trained tower where its weights lie whole, be compiled graphs, as `engine.compile`
        says. `say` is told of what runs uncompiled, or without the CUDA graphs that were asked for.
        """
        if not wants_compiling(setting, self.ranks.device):
            return
        graphs = setting == "graphs"
        if graphs and (reason := self._without_cuda_graphs()):
            say(f"engine.compile 'graphs' is 'on' here: {reason}")
            graphs = False
        self._fusion = Fusion(say)
        if self.attack_copy:
            compile_tower(self.attack_copy.tower, "the attack's student", say, graphs)
        if reason := self._without_a_graph():
            who = "the student and its attack run" if self.attacks and not self.attack_copy else "the student runs"
            say(f"{who} uncompiled: {reason}")
        else:
            compile_tower(self.ds.module, "the student", say)

    def _without_a_graph(self) -> str | None:
        """Why the trained tower cannot be one; None where it can."""
        if self.stage == 3:
            return "engine.zero_stage 3 gathers the weights between the layers"
        if self.ds.module.checkpointed and batch_norm.is_synced(self.ds.module):
            # Each block would be a graph break: torch takes nothing out of what is computed again but its output.
            return "engine.checkpoint_activations leaves no way out to the statistics of student.batch_norm=synced"
        return None

    def _without_cuda_graphs(self) -> str | None:
        """Why none can be made; None where they can."""
        if self.ranks.device.type == "cpu":
            return "a CPU has no CUDA graphs"
        if not self.attacks:
            return "CUDA graphs are the attack's, and the method makes none"
        return None if self.attack_copy else "CUDA graphs are those of the attack's copy; set engine.attack_copy=true"

    def _attack_copy(self, config: Config, tower: ImageTower) -> AttackCopy | None:
        if not config.engine.attack_copy or not config.attack_objective:
            return None
        with self._activations_of_the_attack(tower):
            return AttackCopy(tower)

    def _activations_of_the_attack(self, tower: ImageTower) -> AbstractContextManager[None]:
        return nullcontext() if self.checkpoint_attack else keeping_activations(tower)

    def _deepspeed_config(self, config: Config) -> dict:
        share = config.train.batch_size // self.ranks.world_size
        return {
            "train_batch_size": config.train.batch_size,
            "train_micro_batch_size_per_gpu": share // self.accumulation,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": config.train.grad_clip or 0.0,  # DeepSpeed's own default is 1.0
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": config.engine.zero_stage,
                "reduce_bucket_size": bucket_size(self.elements),
                "overlap_comm": self._overlaps(config.engine.zero_stage),
                "memory_efficient_linear": False,  # would replace F.linear for the whole process, the teachers included
            },
            "steps_per_print": 2**31,
            # DeepSpeed's timer waits for the whole device at every forward of the module, each attack step's included.
            "timers": {"throughput": {"enabled": False}},
        }

    def _overlaps(self, stage: int) -> bool:
        """Whether gradients travel while the backward goes on.

        Not in stages 1 and 2 on one GPU, which has nothing to send, or on a CPU, which has no second stream.
        """
        return stage == 3 or self.ranks.world_size > 1 and self.ranks.device.type == "cuda"

    @property
    def micro_batch_size(self) -> int:
        """Samples of a rank that one forward takes."""
        return self.ds.train_micro_batch_size_per_gpu()

    def __call__(self, images: Tensor, seeds: Tensor, tokens: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The forward that `backward` differentiates; what is random in it comes from the seeds.

        images [V*B,3,H,W] float32 in [0,1]: V groups of the same B samples; seeds int64 [B] -> embeddings [V*B,D]
        float32. tokens: also the patches' tokens [V*B,P,D].
        """
        self.ds.module.layout.describe(len(images), seeds)
        self.ds.train()
        return self.ds(images, tokens=True) if tokens else self.ds(images)

    @contextmanager
    def attack_forward(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """The tower in evaluation mode for `torch.autograd.grad` on its input; its weights gather no gradient.

        It is the attack's copy where there is one, brought up to date first; under stage 3 that is collective. Else it
        is the trained tower, under one surrounding autocast region that keeps each weight's bf16 copy for all attack
        steps; the region is disabled itself, so that everything outside the tower stays float32.
        """
        if self.attack_copy:
            self._refresh_copy()
            with self._arithmetic(self.attack_copy.tower):
                yield self.attack_copy.tower
            return
        module = self.ds.module
        module.eval()
        try:
            with (
                torch.autocast(self.ranks.device.type, enabled=False),
                self._activations_of_the_attack(module),
                self._arithmetic(module),
            ):
                yield lambda images: module(images)
        finally:
            module.train()

    def _arithmetic(self, attacked: ImageTower) -> AbstractContextManager:
        """The attack's arithmetic in kernels of its own where the tower that it attacks is a graph; else as it is."""
        compiled = attacked.graph is not None and not attacked.graph.failed
        return fused(self._fusion) if compiled and self._fusion else nullcontext()

    def _refresh_copy(self) -> None:
        """Let the attack's copy have the weights of the last update."""
        if not self._copy_is_old:
            return
        for part in self.attack_copy.parts(GATHERED_AT_ONCE if self.stage == 3 else None):
            weights = deepspeed.zero.GatheredParameters(part.sources) if self.stage == 3 else nullcontext()
            with weights:
                part.refresh()
        self._copy_is_old = False

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a micro-batch's mean loss."""
        self.ds.backward(loss)

    def end_micro_batch(self, lr: float) -> UpdateResult | None:
        """Tell DeepSpeed a micro-batch is over; at the last of a step, update the weights with `lr`.

        A gradient that is not finite on any rank leaves weights, statistics, moments and averages as they were.
        """
        step = self._end_micro_batch(lr)
        if not step or not step.applied:
            return step
        self._copy_is_old = True
        batch_norm.update_running(self.ds.module)
        self.portable.move_average()
        return step

    def _end_micro_batch(self, lr: float) -> UpdateResult | None:
        last = self.ds.is_gradient_accumulation_boundary()
        for group in self.ds.optimizer.param_groups:
            group["lr"] = lr
        if not last:
            self.ds.step()
            return None
        if self.stage == 0:
            norm = self._grad_norm()
            if not math.isfinite(norm):
                self.ds.zero_grad()  # AdamW leaves parameters without a gradient alone
            self.ds.step()
            return UpdateResult(math.isfinite(norm), norm)
        self.ds.step()
        applied = self.ds.was_step_applied()
        return UpdateResult(applied, self.ds.get_global_grad_norm() if applied else math.inf)

    def _grad_norm(self) -> float:
        norms = [p.grad.norm() for p in self.ds.module.parameters() if p.grad is not None]
        return torch.stack(norms).norm().item()

    def full_state(self) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
        """(trained weights and buffers, optimizer states, updates applied) on the first rank's CPU. Collective."""
        return self.portable.gather()

    def restore(self, states: dict[str, Tensor], updates: int) -> None:
        """Set the optimizer's states and update count as `full_state` gave them; the weights come with the tower."""
        self.portable.restore(states, updates)


def end_reductions_without_waiting(optimizer: stage_1_and_2.DeepSpeedZeroOptimizer) -> None:
    """Let the end of a backward make the device's streams wait for one another, in place of the host for the device.

    DeepSpeed 0.19 reduces gradients on a stream of its own (`overlap_comm`), and in stages 1 and 2 waits for the whole
    device at the end of each backward that reduced. What follows needs the reduced gradients, or takes memory that is
    free from then on, and all of it is of the current stream: it is enough that this one waits for the other.
    """
    end, accelerator = optimizer.independent_gradient_partition_epilogue, get_accelerator()

    def order(device: object = None) -> None:
        accelerator.current_stream().wait_stream(optimizer.reduction_stream)

    def end_in_order() -> None:
        accelerator.synchronize = order  # this object's, in front of its class's
        try:
            end()
        finally:
            del accelerator.synchronize

    optimizer.independent_gradient_partition_epilogue = end_in_order


def mark_norms_without_waiting() -> None:
    """Let DeepSpeed mark a norm that is not finite without a copy; a version without that function is left as it is.

    DeepSpeed 0.19 copies the mark, -1, from the host to the device for each group of weights at each update, and the
    host waits for each copy.
    """
    for module in (stage_1_and_2, stage3):
        if hasattr(module, NORM_MARK):
            setattr(module, NORM_MARK, _mark)


def _mark(norm: Tensor, device: object = None, val: float = -1.0) -> None:
    """norm: float, any shape; what is infinite or no number becomes `val`, in place. device: the norm's, of no use."""
    norm.masked_fill_(~norm.isfinite(), val)
