"""The folder of a run: what it decided, where it goes on from, and that nothing in it is lost that is not the run's."""

from __future__ import annotations

import json
import os
import secrets
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from .. import config as settings
from ..config import Config, Model
from ..distributed.ranks import Ranks
from ..errors import RunError, UserError
from ..files import discard, refuse_special, wait_for, why_not_written, write_text
from . import checkpoints, checksums, history, layout, lock
from .environment import device_name, environment

# What a start writes anew, cuts or removes. In a folder that is no run's, these files are someone else's.
WRITTEN = (
    layout.CONFIG,
    layout.ENVIRONMENT,
    layout.METRICS,
    layout.EVENTS,
    layout.PROBES,
    layout.HISTORY,
    layout.CHECKSUMS,
    layout.CLASS_EMBEDDINGS,
    layout.WANDB,
    layout.START,
    layout.CHECKPOINTS,
    layout.HEARTBEATS,
    layout.PROBE,
)
TEACHERS = "teachers_sha256"  # of a start and of a checkpoint's state: teacher -> the hash of its weights
MAY_BE_LINKS = (layout.CHECKPOINTS,)  # a folder on another disk


@dataclass(frozen=True)
class RunFolder:
    """A prepared run folder: `checkpoint` to go on from (None: from the start) and its `state`.

    passed_over: newer checkpoints that are not whole, and why.
    """

    path: Path
    checkpoint: Path | None
    state: dict
    passed_over: list[str] = field(default_factory=list)
    lock: list[IO | lock.Owner] = field(default_factory=list, repr=False)  # of the first rank; goes with this object

    @property
    def step(self) -> int:
        """Steps that are done; 0 from the start."""
        return self.state.get("step", 0)

    @property
    def updates(self) -> int:
        """The optimizer's updates so far, fewer than steps where some were skipped. UserError for a state without."""
        updates = self.state.get("updates")
        if not isinstance(updates, int):
            raise UserError(f"'{self.checkpoint}': {checkpoints.STATE} has no `updates`; remove this checkpoint")
        return updates


def prepare(config: Config, fingerprint: str, ranks: Ranks) -> RunFolder:
    """Find where the run goes on, refuse what changed, and write config.yaml, environment.json and a line of history.

    Collective. Raises UserError on every rank when the configuration or the data differ from the run's and
    `resume.allow` does not list the keys, when there are checkpoints but none is whole, when the folder holds files
    that are not a run's, or when another process works in it; RunError when the bounds of `resume` do not let it start
    again.
    """
    held: list[IO | lock.Owner] = []
    hosts = ranks.all_gather(f"{socket.gethostname()} rank {ranks.rank} {device_name(ranks.device)}")
    found = ranks.run_on_first(lambda: _prepare(config, fingerprint, ranks.world_size, hosts, held))
    if isinstance(found, str):
        raise RunError(f"'{config.run_dir}': {found}")
    wait_for(found[0] / layout.HISTORY)  # on the other nodes
    return RunFolder(*found, held)


def _prepare(
    config: Config, fingerprint: str, world_size: int, hosts: list[str], held: list
) -> tuple[Path, Path | None, dict, list[str]] | str:
    run = Path(config.run_dir)
    _make(run)
    _refuse_links(run)
    refuse_special(run)
    refuse_foreign(run)
    held += lock.take(run)
    if (run / layout.CONFIG).exists():
        remedy = "put it back (changes are given as key=value), or move it away to go on with the settings given now"
        checksums.verify(run, layout.CONFIG, remedy)
    newest, passed_over = checkpoints.newest_valid(run)
    if newest is None and passed_over:
        raise UserError(
            f"'{run}' has checkpoints but none is whole ({'; '.join(passed_over[:4])}); "
            f"remove '{run / layout.CHECKPOINTS}' to start over"
        )
    state = checkpoints.read_state(newest) if newest else {}
    changed = _refuse_changes(run, config, state, fingerprint) if newest else {}
    refused = history.why_not_restart(run, config.resume, state.get("step", 0))
    if refused:
        return refused
    start = {
        "step": state.get("step", 0),
        "checkpoint": newest.name if newest else None,
        "world_size": world_size,
        "passed_over": passed_over,
        "changed": {key: list(values) for key, values in changed.items()},
    }
    try:
        _write_start(run, config, hosts, start)
    except OSError as error:
        raise UserError(why_not_written(run, error)) from None
    return run, newest, state, passed_over


def note_teachers(folder: RunFolder, config: Config, found: dict[str, str]) -> None:
    """Write the sha256 of each teacher's weights, as `found` at this start, to its line of history. First rank alone.

    Raises UserError when the run was trained with other weights and `resume.allow` lists neither this nor the setting
    that says which weights to take. A checkpoint of an earlier version knows none, and any are taken.
    """
    known = folder.state.get(TEACHERS, {})
    changed = {
        f"teachers.{name}.sha256": (known[name], sha256)
        for name, sha256 in found.items()
        if known.get(name, sha256) != sha256
    }
    refused = [key for key in changed if not any(_is_allowed(k, config) for k in (key, *_decide_weights(key, config)))]
    if refused:
        listed = "; ".join(f"{key}: {changed[key][0][:12]} -> {changed[key][1][:12]}" for key in refused)
        raise UserError(
            f"'{folder.path}' was trained with other weights of its teachers ({listed}); put the old weights back, "
            f"or go on with the new ones by resume.allow=[{','.join(refused)}]"
        )
    history.add_to_start(folder.path, {key: list(values) for key, values in changed.items()}, **{TEACHERS: found})


def _decide_weights(key: str, config: Config) -> list[str]:
    """The settings that say which weights the teacher of `teachers.NAME.sha256` takes."""
    teacher = key.removesuffix(".sha256")
    drawn = config.ensemble[teacher.removeprefix("teachers.")].weights == "random"
    return [f"{teacher}.{field}" for field in Model.model_fields] + ["seed"] * drawn


def refuse_foreign(run: Path) -> None:
    """Raise UserError when a start in this folder would replace files that are not a run's."""
    found = [name for name in WRITTEN if (run / name).exists()]
    if found and not _is_run(run):
        raise UserError(
            f"run_dir: '{run}' is no run's folder, and holds {', '.join(found)}, which a run would replace; "
            "move what is yours (a configuration, too) out of it, or choose another folder"
        )


def _is_run(run: Path) -> bool:
    """Whether the folder has a run's history, or a checkpoint of one that lost it."""
    path = run / layout.HISTORY
    begun = path.is_file() and path.stat().st_size == 0
    return begun or bool(history.read(run)) or checkpoints.any_manifest(run)


def _make(run: Path) -> None:
    try:
        run.mkdir(parents=True, exist_ok=True)
        # A name of its own, which no link can wait at, and no other start of the same moment takes.
        trial = run / f".writable.{os.getpid()}-{secrets.token_hex(4)}.part"
        trial.touch(exist_ok=False)
        trial.unlink()
    except OSError as error:
        raise UserError(f"run_dir: cannot write to '{run}': {error.strerror}; choose another folder") from None


def _refuse_links(run: Path) -> None:
    """Raise UserError for a link in the place of a file of the run: what it points to would be written."""
    for name in (*WRITTEN, layout.LOCK, layout.OWNER):
        if (run / name).is_symlink() and name not in MAY_BE_LINKS:
            raise UserError(
                f"run_dir: '{run / name}' is a link, and a run writes through none; "
                "put the file itself there, or remove the link"
            )


def _refuse_changes(run: Path, config: Config, state: dict, fingerprint: str) -> dict[str, tuple]:
    """What changed since the run was started, by key; UserError when `resume.allow` does not list all of it."""
    changed = _changes(run, config, state, fingerprint)
    refused = [key for key in changed if not _is_allowed(key, config)]
    if refused:
        listed = "; ".join(f"{key}: {changed[key][0]!r} -> {changed[key][1]!r}" for key in refused)
        raise UserError(
            f"'{run}' was started with other settings ({listed}); "
            "restore them, list the keys in resume.allow, or choose another run_dir"
        )
    return changed


def _is_allowed(key: str, config: Config) -> bool:
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in config.resume.allow)


def _changes(run: Path, config: Config, state: dict, fingerprint: str) -> dict[str, tuple]:
    stored = settings.load(run / layout.CONFIG) if (run / layout.CONFIG).is_file() else config
    changed = settings.differences(stored, config)
    if state.get("data_fingerprint") != fingerprint:
        changed["data.fingerprint"] = (state.get("data_fingerprint"), fingerprint)
    return changed


def _write_start(run: Path, config: Config, hosts: list[str], start: dict) -> None:
    (run / layout.HISTORY).touch()  # first: from now on the folder is known as a run's
    with checksums.renewed(run, layout.CONFIG):
        write_text(run / layout.CONFIG, settings.dump(config))
    write_text(run / layout.ENVIRONMENT, json.dumps(environment(hosts), indent=1) + "\n")
    for left in (run / layout.HEARTBEATS, *run.glob(".*.part")):  # by an earlier start that was killed
        discard(left)
    history.record_start(run, start)
