"""A rank that trains each kind of student for a few steps. Saves what came out.

Usage: students.py OUT CASE...; CASE is KIND-STAGE. Kinds: `ema` (and activation checkpointing) and `lora`, a ViT;
`bn`, a ResNet with synced batch norm, which `bnc` computes a second time (activation checkpointing). `bng` and `lorag`
are compiled graphs, the latter's with activation checkpointing.
"""

import sys
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from compiling import graphs_made, graphs_without_cpp
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer

from mmtard import config
from mmtard.distributed import ranks as process_group
from mmtard.distributed.processes import exit_process
from mmtard.distributed.ranks import Ranks
from mmtard.models import batch_norm, lora, student
from mmtard.models.image_tower import ImageTower
from mmtard.models.weights import load_trained
from mmtard.training.engine import Engine
from mmtard.training.optimizer import parameter_groups

STEPS, BATCH, SIZE, LR, DECAY = 4, 8, 32, 1e-2, 0.75
SETTINGS = {
    "ema": {"train": {"ema": DECAY}, "engine": {"checkpoint_activations": True}},
    "bn": {"train": {"ema": DECAY}, "student": {"batch_norm": "synced"}},
    "bnc": {"train": {"ema": DECAY}, "student": {"batch_norm": "synced"}, "engine": {"checkpoint_activations": True}},
    "lora": {"train": {"ema": DECAY}, "student": {"lora": {"r": 4, "alpha": 8, "dropout": 0.2}}},
}
COMPILED = {"bng": ("bn", {"compile": "on"}), "lorag": ("lora", {"compile": "on", "checkpoint_activations": True})}
SETTINGS |= {kind: {**SETTINGS[of], "engine": engine} for kind, (of, engine) in COMPILED.items()}


def settings(kind: str, stage: int) -> config.Config:
    own = SETTINGS[kind]
    return config.validate(
        {
            "run_dir": "unused",
            "student": {"weights": "random", **own.get("student", {})},
            "method": {"name": "clean"},
            "data": {"shards": "unused", "lanes": BATCH},
            "train": {"steps": STEPS, "batch_size": BATCH, "lr": LR, **own.get("train", {})},
            "engine": {"zero_stage": stage, "precision": "float32", "device": "cpu", **own.get("engine", {})},
        }
    )


def start(kind: str, synced: bool = True, checkpointing: bool = True) -> ImageTower:
    # AdamW makes whole steps of first gradients that are rounding noise, which differ by CPU: with 188 the least of all
    # weights is 1.7e-5 of its tensor's root mean square, with 0 it is 1e-6.
    torch.manual_seed(188 if kind.startswith("bn") else 0)
    if kind.startswith("bn"):
        visual = ModifiedResNet([1, 1, 1, 1], output_dim=16, heads=4, image_size=SIZE, width=8)
        for name, p in visual.named_parameters():
            if name.endswith("bn3.weight"):
                torch.nn.init.ones_(p)  # open_clip begins with no residual branch
    else:
        visual = VisionTransformer(
            image_size=SIZE, patch_size=16, width=32, layers=2, heads=2, mlp_ratio=2, output_dim=16
        )
    tower = ImageTower(visual, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    if kind.startswith("bn") and synced:
        batch_norm.synchronise(visual, tower.layout)
    tower.frozen_batch_norm = not kind.startswith("bn")
    if settings(kind, 0).engine.checkpoint_activations and checkpointing:
        student.checkpoint_activations(tower)
    if kind.startswith("lora"):
        lora.attach(visual, settings(kind, 0).student.lora, tower.layout)
    return tower


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(step)
    return (
        torch.rand(BATCH, 3, SIZE, SIZE, generator=g),
        F.normalize(torch.randn(BATCH, 16, generator=g), dim=-1),
        torch.randint(2**60, (BATCH,), generator=g),
    )


def loss(forward, images: torch.Tensor, wanted: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    """Two views a sample, drawn towards fixed directions."""
    z = forward(torch.cat([images, images.flip(-1)]), seeds)
    return (F.normalize(z, dim=-1) - torch.cat([wanted, wanted])).square().sum(-1).mean()


def plain(kind: str) -> dict[str, torch.Tensor]:
    """The tower's weights and buffers after the same training in PyTorch alone, in one process."""
    tower = start(kind, synced=False, checkpointing=False).train()
    adam = torch.optim.AdamW(parameter_groups(tower, 1e-4), lr=LR)

    def forward(images, seeds):
        tower.layout.describe(len(images), seeds)
        if not kind.startswith("bn"):
            return tower(images)
        return torch.cat([tower(view) for view in images.chunk(2)])  # each with its own statistics

    norms = [m for m in tower.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    inputs = {norm: [] for norm in norms}
    for norm in norms:
        norm.register_forward_hook(lambda norm, given, _: inputs[norm].append(given[0].detach().clone()))
    for step in range(STEPS):
        adam.zero_grad()
        before = {norm: (norm.running_mean.clone(), norm.running_var.clone()) for norm in norms}
        loss(forward, *batch(step)).backward()
        adam.step()
        for norm, (mean, var) in before.items():  # both views as one batch, once
            both = torch.cat(inputs[norm]).transpose(0, 1).flatten(1)
            norm.running_mean, norm.running_var = 0.9 * mean + 0.1 * both.mean(1), 0.9 * var + 0.1 * both.var(1)
            norm.num_batches_tracked -= 1
            inputs[norm].clear()
    return {k: v.detach() for k, v in tower.state_dict().items()}


def train(engine: Engine, ranks: Ranks, steps: range, finite: bool = True) -> list[dict[str, torch.Tensor]]:
    """The weights after each step; not finite: a step that is skipped."""
    share, after = BATCH // ranks.world_size, []
    for step in steps:
        mine = (x[ranks.rank * share : (ranks.rank + 1) * share] for x in batch(step))
        engine.backward(loss(engine, *mine) * (1 if finite else torch.nan))
        assert engine.end_micro_batch(LR).applied == finite
        after.append(engine.full_state()[0])
    return after


def case(kind: str, stage: int, ranks: Ranks) -> dict:
    """A run in one go, with a step in its middle that is skipped; and what a run in another stage makes of its half."""
    whole, said = Engine(settings(kind, stage), start(kind), ranks), []
    whole.compile(settings(kind, stage).engine.compile, said.append)
    first = train(whole, ranks, range(2))
    graphs = graphs_made() if kind in COMPILED else 0
    train(whole, ranks, range(99, 100), finite=False)
    half = whole.full_state()
    after = first + train(whole, ranks, range(2, STEPS))
    later = graphs_made() if kind in COMPILED else 0
    _, states, updates = whole.full_state()
    weights, half_states, half_updates = ranks.run_on_first(lambda: half)
    tower = start(kind)
    load_trained(tower, weights, "half")
    resumed = Engine(settings(kind, (stage + 1) % 4), tower, ranks)
    resumed.restore(half_states, half_updates)
    train(resumed, ranks, range(2, STEPS))
    buffers = [ranks.all_gather(dict(engine.ds.module.visual.named_buffers())) for engine in (whole, resumed)]
    return {
        "weights": after,
        "states": states,
        "updates": updates,
        "resumed": resumed.full_state(),
        "buffers": buffers,
        "graphs": [graphs, later],
        "said": said,
    }


if __name__ == "__main__":
    out, *cases = sys.argv[1:]
    ranks = process_group.start("cpu")
    results = {}
    for name in cases:
        kind, stage = name.split("-")
        with graphs_without_cpp() if kind in COMPILED else nullcontext():
            results[name] = case(kind, int(stage), ranks)
    if ranks.is_first:
        torch.save(results, out)
    process_group.stop()
    exit_process(0)
