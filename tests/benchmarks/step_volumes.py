"""A rank of the test of volumes: writes what a step of a tower sends by torch.distributed, in numbers of the tower.

Usage: step_volumes.py OUT CASE...; CASE is STAGE-COPY, such as `3-True`: the ZeRO stage, and `engine.attack_copy`.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import torch
from open_clip.transformer import VisionTransformer
from parallel import five_steps

from mmtard.distributed import ranks as process_group
from mmtard.distributed.collectives import wrapped_collectives
from mmtard.distributed.processes import exit_process
from mmtard.models.image_tower import ImageTower

SHARE = five_steps.BATCH // 2


def tower() -> ImageTower:
    """Nearly all of its weights are in matrices of more than 1e5 numbers: ZeRO-3 keeps smaller ones on every rank."""
    visual = VisionTransformer(image_size=16, patch_size=8, width=384, layers=2, heads=2, mlp_ratio=2, output_dim=16)
    return ImageTower(visual, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def volumes(case: str, ranks: process_group.Ranks, sent: Counter) -> dict[str, float]:
    """Numbers that each collective moved in the third step, when ZeRO-3 knows the order of the layers."""
    from mmtard.distillation.task import DistillationTask
    from mmtard.models.teachers import FrozenTeacher
    from mmtard.training.engine import Engine
    from mmtard.zero_shot import ZeroShotHead

    stage, copy = case.split("-")
    config = five_steps.settings(int(stage), "replicated", "float32", SHARE)
    engine_settings = config.engine.model_copy(update={"attack_copy": copy == "True"})
    config = config.model_copy(update={"engine": engine_settings})
    student = tower()
    elements = sum(p.numel() for p in student.parameters())
    engine, head = Engine(config, student, ranks), ZeroShotHead(five_steps.text(), 20.0)
    teachers = {
        name: FrozenTeacher(name, settings, five_steps.tower(1), head, ranks, torch.float32)
        for name, settings in config.teachers.items()
    }
    task = DistillationTask(config, engine, head, teachers)
    for batch in list(five_steps.batches())[:3]:
        sent.clear()
        loss, _ = task(*(part[ranks.rank * SHARE : (ranks.rank + 1) * SHARE] for part in batch))
        engine.backward(loss.mean())
        engine.end_micro_batch(five_steps.LR)
    return {name: numbers / elements for name, numbers in sent.items()}


if __name__ == "__main__":
    out, *cases = sys.argv[1:]
    sent: Counter = Counter()

    def counted(collective):
        def call(*args, **kwargs):
            sizes = [t.numel() for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
            sent[getattr(collective, "__name__", "wait")] += max(sizes, default=0)
            return collective(*args, **kwargs)

        return call

    torch.manual_seed(0)
    ranks = process_group.start("cpu")
    with wrapped_collectives(counted):
        found = {case: volumes(case, ranks, sent) for case in cases}
    if ranks.is_first:
        Path(out).write_text(json.dumps(found))
    process_group.stop()
    exit_process(0)
