"""The command `config`: the resolved configuration, what is wrong with it, and what each setting means."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

from .. import config as settings, resources
from ..config import Config, Data, Model, model_errors
from ..config.argument_types import positive
from ..config.open_clip_names import architectures, weight_tags
from ..config.world import check_world
from ..data.paths import shards_of
from ..distributed.launcher import world_size_from_env
from ..embeddings.settings import stored_teachers
from ..errors import UserError
from .command import add_command, add_config_arguments, may_start


def add(commands) -> None:
    """Add the command to the command line."""
    p = add_command(
        commands,
        "config",
        _config,
        "Print the resolved configuration and what is wrong with it, or explain the settings.",
        "mmtard config configs/vitb32_mmtard.yaml train.lr=1e-5\n         mmtard config --explain attack.eps",
        more="Status 2 where something is wrong: models, shards or files that are not there, sizes that do not fit.",
    )
    p.add_argument(
        "--explain",
        nargs="?",
        const="",
        metavar="KEY",
        help="instead, what a setting or a section means, its default and its bounds; without KEY, all of them",
    )
    p.add_argument("--schema", action="store_true", help="instead, the JSON schema of a configuration, for editors")
    p.add_argument("--memory", action="store_true", help="instead, a table of what the run takes of each GPU's memory")
    p.add_argument(
        "--world",
        type=positive,
        metavar="N",
        help="GPUs for --memory, and for which batch and lanes are checked; default: this launch's",
    )
    p.add_argument(
        "--may-start",
        choices=("now", "again", "signalled"),
        help="instead of looking for what is wrong, fail when the `resume` settings do not let the run be started; "
        "again: nor when this job's own start failed, was stopped by a person, or ended before it was noted; "
        "signalled: as again, but a start that a signal ended before it was noted may be repeated within a bound, "
        "and is written into RUN_DIR/unnoted.jsonl",
    )
    p.add_argument(
        "--not-stored",
        action="store_true",
        help="instead, the names of the teachers that are set to be stored and whose embeddings are not there yet",
    )
    add_config_arguments(p, optional=True)


def _config(args) -> int | None:
    if args.explain is not None or args.schema:
        from ..config import explain

        print(json.dumps(explain.json_schema(), indent=1) if args.schema else explain.explain(args.explain))
        return 0
    if args.config is None:
        raise UserError("CONFIG: name a configuration; `mmtard configs` lists those that come with mmtard")
    config = settings.load(args.config, args.overrides)
    if args.may_start:
        may_start(config, args.may_start)
    if args.not_stored:
        print(*(name for name, folder in stored_teachers(config).items() if folder is None), sep="\n")
        return 0
    if args.memory:
        from ..training import memory

        return memory.show(config, args.world or world_size_from_env())
    print(settings.dump(config), end="")
    faults = [] if args.may_start else [*find_faults(config), *_world_faults(config, args.world)]
    for fault in faults:
        print(f"mmtard: {fault}", file=sys.stderr)
    return 2 if faults else 0


def find_faults(config: Config) -> Iterator[str]:
    """What can be seen to be wrong with a configuration without loading a model or reading a shard, a line each."""
    yield from _model_faults(config.student, "student")
    for name in config.ensemble:
        if config.model_of(name) is not config.student:
            yield from _model_faults(config.model_of(name), f"teachers.{name}")
    yield from _shard_faults(config.data)
    if config.probe is not None:
        probed = config.data.model_copy(update={"shards": config.probe.data})
        for fault in _shard_faults(probed):
            yield fault.replace("data.shards", "probe.data", 1)
    yield from _missing_files(config)
    yield from _doubtful_sizes(config)


def _shard_faults(data: Data) -> Iterator[str]:
    try:
        shards_of(data)
    except UserError as error:
        yield str(error)


def _model_faults(model: Model, where: str) -> Iterator[str]:
    source, known = Path(model.weights), architectures()
    arch = model.arch.replace("/", "-") if model.arch else None
    if model.arch and model.arch.endswith(".json"):
        if not Path(model.arch).is_file():
            yield f"{where}.arch: '{model.arch}' does not exist; correct the path of the model config"
            return
    elif arch and known and arch not in known:
        yield str(model_errors.unknown_architecture(f"{where}.arch", model.arch, known))
        return
    if model.weights == "random" or model.weights.startswith("hf-hub:") or source.exists():
        return
    if "/" in model.weights:
        made_by = f"; `mmtard train {name}` makes it" if (name := _makes(model.weights)) else ""
        yield f"{model_errors.absent_weights(where, model.weights)}{made_by}"
    elif arch is None:
        yield str(model_errors.no_architecture(f"{where}.arch", model.weights))
    elif weight_tags() and model.weights not in (tags := weight_tags().get(arch, ())):
        yield str(model_errors.unknown_weights(where, model.weights, model.arch, sorted(tags)))


def _makes(folder: str) -> str | None:
    """The configuration of mmtard's own whose run is kept in this folder."""
    kept_in = re.compile(rf"^run_dir: {re.escape(folder)}$", re.MULTILINE)
    own = resources.configurations().items()
    return next((name for name, file in own if kept_in.search(file.read_text(encoding="utf-8"))), None)


def _world_faults(config: Config, world: int | None) -> Iterator[str]:
    """What does not divide over the ranks, where the user says how many: one machine's configuration is another's."""
    if world is None:
        return
    try:
        check_world(config, world)
    except UserError as error:
        yield str(error)


def _missing_files(config: Config) -> Iterator[str]:
    named = {"data.index": config.data.index, "data.classnames": config.data.classnames}
    if isinstance(config.data.templates, str) and "{" not in config.data.templates:
        named["data.templates"] = config.data.templates
    if config.probe is not None:
        named |= {"probe.index": config.probe.index, "probe.classnames": config.probe.classnames}
    for key, path in named.items():
        if path is not None and not Path(path).is_file() and not (key.endswith("index") and Path(path).parent.is_dir()):
            yield f"{key}: '{path}' is no file; correct the path"


def _doubtful_sizes(config: Config) -> Iterator[str]:
    attack, train = config.attack, config.train
    # With one step from anywhere in the ball, a step above eps is a known recipe (1.25 eps: Wong et al., ICLR 2020).
    most = attack.eps * (Fraction(2) if attack.steps == 1 else 1)
    if config.attack_objective and attack.algorithm == "pgd" and attack.step_size and attack.step_size > most:
        yield (
            f"attack.step_size: {settings.show_pixels(attack.step_size)} is above attack.eps "
            f"{settings.show_pixels(attack.eps)}, so that every step ends on the border; lower it, or raise attack.eps"
        )
    if train.lr > 1:
        yield f"train.lr: {train.lr:g}: AdamW moves every weight by about that much a step; write one below 0.01"
    if train.lr * train.weight_decay >= 1:
        yield f"train.weight_decay: {train.weight_decay:g} times train.lr {train.lr:g} is not below 1; lower it"
