"""A rank of the equivalence test: five MMT-ARD steps with PGD inside on fixed tiny towers and images. Saves what came
out.

Usage: five_steps.py OUT CASE...; CASE is `plain` (PyTorch alone) or STAGE-PLACEMENT-PRECISION-MICROBATCH, such as
`2-sharded-float32-4`; with -WAY after it, one of SETTINGS or of `way`.
"""

import json
import sys
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer

from mmtard import config, losses, seeding
from mmtard.distributed import ranks as process_group
from mmtard.distributed.processes import exit_process
from mmtard.distributed.ranks import Ranks
from mmtard.models.image_tower import ImageTower
from mmtard.zero_shot import ZeroShotHead

STEPS, BATCH, CLASSES, LR = 5, 8, 5, 1e-3
SMALL_BUCKET = 7_000  # the largest tensor fits, all 24,064 weights take four
SETTINGS = {  # of `engine`, for the ways that are settings
    "uncopied": {"attack_copy": False},
    "checkpointed": {"checkpoint_activations": True, "checkpoint_attack": True},
    "compiled": {"compile": "on"},
    # Of one tower: blocks whose activations are computed again, and in the attack are not.
    "compiled_checkpointed": {"compile": "on", "checkpoint_activations": True, "attack_copy": False},
}


def tower(seed: int) -> ImageTower:
    torch.manual_seed(seed)
    visual = VisionTransformer(image_size=16, patch_size=8, width=32, layers=2, heads=2, mlp_ratio=2, output_dim=16)
    return ImageTower(visual, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def text() -> torch.Tensor:
    return F.normalize(torch.randn(CLASSES, 16, generator=torch.Generator().manual_seed(100)), dim=-1)


def batches():
    g = torch.Generator().manual_seed(200)
    for _ in range(STEPS):
        yield (
            torch.rand(BATCH, 3, 16, 16, generator=g),
            torch.randint(CLASSES, (BATCH,), generator=g),
            torch.randint(2**60, (BATCH,), generator=g),
        )


def settings(
    stage: int, placement: str, precision: str, micro: int, device: str = "cpu", **engine: bool | str
) -> config.Config:
    teacher = {"weights": "random", "placement": placement}
    return config.validate(
        {
            "run_dir": "unused",
            "student": {"arch": "unused", "weights": "random"},
            "teachers": {"clean": teacher, "robust": teacher},
            "method": {"name": "mmtard", "weighting": "confidence_sigmoid"},
            "attack": {"eps": "8/255", "step_size": "2/255", "steps": 3, "momentum": 0.9},
            "data": {"shards": "unused", "lanes": BATCH},
            "train": {"steps": STEPS, "batch_size": BATCH, "micro_batch_size": micro, "lr": LR, "weight_decay": 0.1},
            "engine": {"zero_stage": stage, "precision": precision, "device": device, **engine},
        }
    )


def plain() -> dict:
    """The same training written out in plain PyTorch: no engine, no distillation step, no DeepSpeed."""
    student, clean, robust, t = tower(0), tower(1).eval(), tower(2).eval(), text()
    decayed = [p for p in student.parameters() if p.dim() >= 2]
    rest = [p for p in student.parameters() if p.dim() < 2]
    adam = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=LR)

    def logits(model, x):
        return 20 * F.normalize(model(x), dim=-1) @ t.T

    reported = []
    for x, y, seeds in batches():
        with torch.no_grad():
            q_clean = logits(clean, x).softmax(-1)
        adv = (x + 8 / 255 * (2 * seeding.sample_uniform(seeds, x.shape[1:]) - 1)).clamp(0, 1)
        velocity = torch.zeros_like(x)
        for _ in range(3):
            adv.requires_grad_(True)
            divergence = F.kl_div(logits(student, adv).log_softmax(-1), q_clean, reduction="sum")
            velocity = 0.9 * velocity + torch.autograd.grad(divergence, adv)[0].sign()
            adv = (adv.detach() + 2 / 255 * velocity.sign() - x).clamp(-8 / 255, 8 / 255).add(x).clamp(0, 1)
        with torch.no_grad():
            q_robust = logits(robust, adv).softmax(-1)
            share = torch.sigmoid(4 * (losses.true_class(q_robust, y) - losses.true_class(q_clean, y)))
        kl_robust = F.kl_div(logits(student, adv).log_softmax(-1), q_robust, reduction="none").sum(-1)
        kl_clean = F.kl_div(logits(student, x).log_softmax(-1), q_clean, reduction="none").sum(-1)
        loss = (share * kl_robust + (1 - share) * kl_clean).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        reported.append(loss.item())
    return {"losses": reported, "weights": student.state_dict()}


@contextmanager
def way(name: str):
    """While it lasts: `buckets` of gradients are small, and if `overlapped`, they are reduced during the backward;
    what is compiled makes graphs without writing C++.
    """
    from compiling import graphs_without_cpp

    from mmtard.training import optimizer
    from mmtard.training.engine import Engine

    with ExitStack() as stack:
        if name in ("buckets", "overlapped"):
            stack.enter_context(mock.patch.object(optimizer, "BUCKET", SMALL_BUCKET))
        if name == "overlapped":
            stack.enter_context(mock.patch.object(Engine, "_overlaps", lambda engine, stage: True))
        if name.startswith("compiled"):
            stack.enter_context(graphs_without_cpp())
        yield


def engine(ranks: Ranks, case: str) -> dict:
    from compiling import graphs_made

    from mmtard.distillation.task import DistillationTask
    from mmtard.models.image_tower import DTYPES
    from mmtard.models.student import checkpoint_activations
    from mmtard.models.teachers import FrozenTeacher, compile_teachers
    from mmtard.training.engine import Engine

    stage, placement, precision, micro, name = (*case.split("-"), "")[:5]
    cfg = settings(int(stage), placement, precision, int(micro), ranks.device.type, **SETTINGS.get(name, {}))
    trained = tower(0)
    if cfg.engine.checkpoint_activations:
        checkpoint_activations(trained)
    student, head = Engine(cfg, trained, ranks), ZeroShotHead(text().to(ranks.device), 20.0)
    said: list[str] = []
    student.compile(cfg.engine.compile, said.append)
    teachers = {
        name: FrozenTeacher(name, cfg.teachers[name], tower(seed), head, ranks, DTYPES[precision])
        for seed, name in enumerate(("clean", "robust"), 1)
    }
    compile_teachers(cfg.engine.compile, teachers, ranks.device, said.append)
    step = DistillationTask(cfg, student, head, teachers)
    reported, graphs, share = [], [], BATCH // ranks.world_size
    for batch in batches():
        total = 0.0
        for i in range(ranks.rank * share, (ranks.rank + 1) * share, student.micro_batch_size):
            loss, _ = step(*(part[i : i + student.micro_batch_size].to(ranks.device) for part in batch))
            student.backward(loss.mean())
            outcome = student.end_micro_batch(LR)
            total += loss.sum().item()
        assert outcome.applied
        reported.append(ranks.sum([total])[0] / BATCH)
        graphs.append(graphs_made() if name.startswith("compiled") else 0)
    held = ranks.all_gather({name: t.bytes_here for name, t in teachers.items()})
    weights, _, updates = student.full_state()
    assert not ranks.is_first or updates == STEPS
    sizes = {"held": held, "whole": {name: t.bytes_whole for name, t in teachers.items()}}
    buckets = student.elements / student.ds.optimizer.reduce_bucket_size if int(stage) else 0
    return {
        "losses": reported,
        "weights": weights,
        "bytes": json.dumps(sizes),
        "said": said,
        "graphs": graphs,
        "buckets": buckets,
    }


if __name__ == "__main__":
    out, *cases = sys.argv[1:]
    ranks = process_group.start("cpu")
    results = {}
    for case in cases:
        with way(case.rpartition("-")[2]):
            results[case] = plain() if case == "plain" else engine(ranks, case)
    if ranks.is_first:
        torch.save(results, out)
    process_group.stop()
    exit_process(0)
