"""Commands around training: train, cache, config, preflight."""

from __future__ import annotations

import os
from pathlib import Path

from .. import config as settings
from ..config.argument_types import positive
from ..data.paths import shards_of
from ..distributed.interruption import Interruption
from ..errors import RunError
from ..runs import history, trackers
from .command import add_command, add_config_arguments, heavy_imports


def add(commands) -> None:
    """Add the commands of this file to the command line."""
    _add_train(commands)
    _add_cache(commands)
    _add_config(commands)
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
    _may_start(config)
    with Interruption() as interruption:  # from here on: importing torch takes long enough to be interrupted
        with heavy_imports():
            from ..training.train import train
        return train(config, interruption)


def _add_cache(commands) -> None:
    p = add_command(
        commands,
        "cache",
        _cache,
        "Store the embeddings of the teachers that see clean images alone, so that training need not run them (teachers.NAME.stored).",
        "mmtard cache configs/vitb32_mmtard.yaml data.shards=shards/train\n"
        "         torchrun --nproc_per_node 8 -m mmtard cache configs/vitb32_mmtard.yaml",
    )
    add_config_arguments(p)


def _cache(args) -> None:
    config = _ready(args)
    with Interruption() as interruption:
        from ..embeddings.build import cache

        cache(config, interruption)


def _add_config(commands) -> None:
    p = add_command(
        commands,
        "config",
        _config,
        "Print the resolved configuration, or what is wrong with it.",
        "mmtard config configs/vitb32_mmtard.yaml train.lr=1e-5",
    )
    p.add_argument("--memory", action="store_true", help="instead, a table of what the run takes of each GPU's memory")
    p.add_argument("--world", type=positive, metavar="N", help="GPUs for --memory; default: this launch's")
    p.add_argument(
        "--may-start",
        choices=("now", "again"),
        help="also fail when the `resume` settings do not let the run be started; "
        "again: nor when this job's own start failed, was stopped by a person, or ended before it was noted in the run's folder",
    )
    add_config_arguments(p)


def _config(args) -> None:
    config = settings.load(args.config, args.overrides)
    if args.may_start:
        _may_start(config, again=args.may_start == "again")
    if args.memory:
        from ..training import memory

        return memory.show(config, args.world or settings.world_size_from_env())
    print(settings.dump(config), end="")


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
    settings.check_world(config, settings.world_size_from_env())
    shards_of(config.data)
    trackers.check(config.log)
    if config.engine.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would take a GPU that is there
    return config


def _may_start(config: settings.Config, again: bool = False) -> None:
    run = Path(config.run_dir)
    refused = history.why_not_restart(run, config.resume) or (history.why_not_restart_job(run) if again else None)
    if refused:
        raise RunError(f"'{config.run_dir}': {refused}")
