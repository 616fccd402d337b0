"""Checkpoints of a few numbers, for the tests of whatever saves, keeps or reads them."""

import torch

from mmtard.runs import checkpoints


def tensors(step):
    return {"visual.proj": torch.full((4, 3), float(step)), "visual.scale": torch.tensor(0.5)}


def save(saver, *steps):
    for step in steps:
        saver.save(
            step,
            tensors(step),
            {"exp_avg.visual.proj": torch.full((4, 3), -float(step))},
            {"step": step, "samples": 8 * step},
        )
        saver.wait()


def steps(run):
    return sorted(checkpoints.published(run / "checkpoints"))
