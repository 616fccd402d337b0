"""Commands that run a configuration: train, cache, preflight."""

from __future__ import annotations

from .. import config as settings
from ..data.paths import shards_of
from ..distributed.interruption import Interruption
from ..distributed.launcher import choose_accelerator, world_size_from_env
from ..runs import trackers
from .command import add_command, add_config_arguments, heavy_imports, may_start


def add(commands) -> None:
    """Add the commands of this file to the command line."""
    _add_train(commands)
    _add_cache(commands)
    _add_preflight(commands)


def _add_train(commands) -> None:
    p = add_command(
        commands,
        "train",
        _train,
        "Train, or go on training, the run of a configuration.",
        "mmtard train configs/vitb32_mmtard.yaml run_dir=runs/b32 data.shards=shards/train\n"
        "         torchrun --nproc_per_node 8 -m mmtard train configs/vitb32_mmtard.yaml",
    )
    add_config_arguments(p)


def _train(args) -> int:
    config = _ready(args)
    may_start(config)
    with Interruption() as interruption:  # from here on: importing torch takes long enough to be interrupted
        with heavy_imports():
            from ..training.train import train
        return train(config, interruption)


def _add_cache(commands) -> None:
    p = add_command(
        commands,
        "cache",
        _cache,
        "Store the embeddings of the teachers that see clean images alone, so that training need not run them.",
        "mmtard cache configs/vitb32_mmtard.yaml data.shards=shards/train\n"
        "         torchrun --nproc_per_node 8 -m mmtard cache configs/vitb32_mmtard.yaml",
        more="Training reads them for each teacher that sets teachers.NAME.stored.",
    )
    add_config_arguments(p)


def _cache(args) -> None:
    config = _ready(args)
    with Interruption() as interruption:
        from ..embeddings.build import cache

        cache(config, interruption)


def _add_preflight(commands) -> None:
    p = add_command(
        commands,
        "preflight",
        _preflight,
        "Check, on the ranks of this launch, what a run needs: PASS or FAIL a line, status 1 on any FAIL.",
        "mmtard preflight configs/vitb32_mmtard.yaml data.shards=shards/train",
    )
    add_config_arguments(p)


def _preflight(args) -> int:
    config = _ready(args)
    with heavy_imports():
        from ..training.preflight import preflight
    return preflight(config)


def _ready(args) -> settings.Config:
    """The configuration of a launch, and that its ranks and shards fit it."""
    config = settings.load(args.config, args.overrides)
    settings.check_world(config, world_size_from_env())
    shards_of(config.data)
    trackers.check(config.log)
    choose_accelerator(config.engine.device)
    return config
