"""Four ranks that take themselves for two nodes of two: a teacher sharded within its node, over all, and not at all."""

import os
import sys

rank = int(os.environ["RANK"])
os.environ.pop("TORCHDYNAMO_DISABLE", None)
os.environ.update(LOCAL_RANK=str(rank % 2), LOCAL_WORLD_SIZE="2")

import torch
import torch._dynamo
import torch.distributed as dist
from open_clip.transformer import VisionTransformer

from mmtard.config import Teacher
from mmtard.distributed import ranks as process_group
from mmtard.distributed.ranks import Ranks
from mmtard.models.image_tower import ImageTower
from mmtard.models.teachers import FrozenTeacher, compile_teachers
from mmtard.zero_shot import ZeroShotHead

ranks = process_group.start("cpu")
gathered = {"all": 0, "of other nodes": 0}
NAME = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"  # as FSDP2 calls it
all_gather = getattr(dist, NAME)


def counted(output_tensor, input_tensor, group=None, async_op=False):
    members = dist.get_process_group_ranks(group)
    others = sum(member // 2 != rank // 2 for member in members)
    gathered["all"] += output_tensor.nbytes
    gathered["of other nodes"] += output_tensor.nbytes * others // len(members)
    return all_gather(output_tensor, input_tensor, group=group, async_op=async_op)


def teacher(placement: str) -> FrozenTeacher:
    torch.manual_seed(0)
    # No size is a multiple of 4 throughout, so that shards are padded, too.
    visual = VisionTransformer(image_size=16, patch_size=8, width=30, layers=2, heads=2, mlp_ratio=2, output_dim=10)
    tower = ImageTower(visual, [0.5] * 3, [0.5] * 3)
    settings = Teacher(arch="ViT-B-32", weights="openai", placement=placement)
    return FrozenTeacher("clean", settings, tower, ZeroShotHead(torch.eye(10), 1.0), ranks, torch.float32)


def asked(made: FrozenTeacher) -> dict:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(rank))
    gathered.update({"all": 0, "of other nodes": 0})
    logits = made(images).logits
    counts = dict(gathered)
    images.requires_grad_(True)
    (gradient,) = torch.autograd.grad(made.differentiable(images).logits.square().sum(), images)
    return {"logits": logits, "gradient": gradient, "held": made.bytes_here / made.bytes_whole, **counts}


setattr(dist, NAME, counted)
found = {"a node": ranks.ranks_a_node(), "replicated": asked(teacher("replicated")), "nodes": asked(teacher("sharded"))}
make, said = torch.compile, []
torch.compile = lambda function, mode=None, **s: make(function, backend="aot_eager", **s)  # it writes no C++
with torch._dynamo.config.patch(disable=False):
    by_block = teacher("sharded")
    compile_teachers("on", {"clean": by_block}, ranks.device, said.append)
    found["compiled"] = asked(by_block)
stats = torch._dynamo.utils.counters
found["compiler"] = {"said": said, "graphs": stats["stats"]["unique_graphs"], "breaks": dict(stats["graph_break"])}
torch.compile = make
own = Ranks.ranks_a_node
Ranks.ranks_a_node = lambda self: self.world_size
found["flat"] = asked(teacher("sharded"))
Ranks.ranks_a_node = own
everything = ranks.all_gather(found)
if ranks.is_first:
    torch.save(everything, sys.argv[1])
process_group.stop()
