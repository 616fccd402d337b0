"""Frozen teachers: towers that are asked for predictions, whole on every rank or sharded over the ranks of a node.

Sharding saves (1 - 1/local) of the bytes, with `local` ranks a node (all ranks where a node has one), and gathers all
of the tower once a forward, whatever the micro-batch: that time is bytes / bandwidth, so it weighs less the more images
a rank takes at once. docs/performance.md has what was measured. Rule of thumb: store a teacher that sees clean images
alone; replicate the others; shard one only where the memory it frees lets `train.micro_batch_size` grow (or fit at
all), and only where nodes are linked fast enough to gather it in a fraction of its forward.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ..config import Teacher
from ..distributed.ranks import Ranks
from ..errors import UserError
from ..zero_shot import Prediction, ZeroShotHead
from .compiled import Say, compile_blocks, compile_tower, wants_compiling
from .image_tower import ImageTower, blocks, freeze, why_no_embeddings


class FrozenTeacher:
    """A tower without gradients and the head that turns its embeddings into predictions.

    `dtype` is the one its weights are kept and run in (bfloat16 beside a bf16 student).
    """

    def __init__(
        self, name: str, settings: Teacher, tower: ImageTower, head: ZeroShotHead, ranks: Ranks, dtype: torch.dtype
    ):
        self.name, self.settings, self.head = name, settings, head
        self._checked = False
        self.tower = freeze(tower, dtype, ranks.device)
        if settings.placement == "sharded":
            shard(self.tower, ranks)

    @property
    def placement(self) -> str:
        """`replicated` or `sharded`: whether each rank holds the whole tower or its share."""
        return self.settings.placement

    @torch.no_grad()
    def __call__(self, images: Tensor, tokens: bool = False) -> Prediction:
        """images [B,3,H,W] float32 in [0,1] -> Prediction without gradient, with the patches' tokens when asked for.

        Raises UserError when the first embeddings are none that a model gives: not finite, zero, or all the same.
        """
        embeddings, *rest = self.tower(images, tokens=True) if tokens else (self.tower(images),)
        if not self._checked:  # once: it waits for the device
            self._checked = True
            reason = why_no_embeddings(embeddings, len(images))
            if reason:
                raise UserError(f"teachers.{self.name}: its embeddings are {reason}; take other weights")
        return self.head(embeddings, *rest)

    def differentiable(self, images: Tensor) -> Prediction:
        """The Prediction with its gradient to the images; the weights gather none.

        A sharded tower is gathered again for the backward, so every rank must ask, and differentiate, as often as the
        others.
        """
        return self.head(self.tower(images))

    @property
    def bytes_here(self) -> int:
        """Bytes of weights that this rank holds between forwards."""
        local = (p.to_local() if hasattr(p, "to_local") else p for p in self.tower.parameters())
        return sum(p.numel() * p.element_size() for p in local)

    @property
    def bytes_whole(self) -> int:
        """Bytes of the whole tower's weights."""
        return sum(p.numel() * p.element_size() for p in self.tower.parameters())


def shard(tower: ImageTower, ranks: Ranks) -> None:
    """Spread a frozen tower with FSDP2: each block gathered for its forward and freed after it. Collective.

    Over the ranks of a node, each node holding all of it, so that no block crosses the network; over all ranks where
    there is one node, or one rank a node.
    """
    local = ranks.ranks_a_node()
    # Without a mesh of its own, FSDP2 would take the GPUs that a run on CPUs leaves alone.
    if 1 < local < ranks.world_size:
        nodes = ranks.world_size // local
        mesh = init_device_mesh(ranks.device.type, (nodes, local), mesh_dim_names=("nodes", "local"))["local"]
    else:
        mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    for module in (*blocks(tower), tower):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def compile_teachers(setting: str, teachers: dict, device: torch.device, say: Say) -> None:
    """Let the forwards of teachers be compiled graphs, as `engine.compile` says.

    A sharded one gathers its weights between the blocks, each of which is compiled for itself.
    """
    if not wants_compiling(setting, device):
        return
    for name, teacher in teachers.items():
        compile = compile_tower if teacher.placement == "replicated" else compile_blocks
        compile(teacher.tower, f"teacher {name}", say)
