"""The folder of a run: what it decided, where it goes on from, and that one start at a time works in it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from .. import config as settings
from ..config import Config
from ..distributed.ranks import Ranks
from ..errors import RunError, UserError
from . import checkpoints, history
from .environment import device_name, environment
from .layout import CONFIG, ENVIRONMENT, HEARTBEATS, LOCK

LOCK_WAIT_S = 60.0  # a start that was killed on another node may leave the file system a while to notice


@dataclass(frozen=True)
class RunFolder:
    """A prepared run folder: `checkpoint` to go on from (None: from the start) and its `state`."""

    path: Path
    checkpoint: Path | None
    state: dict
    lock: list[IO] = field(default_factory=list, repr=False)  # of the first rank; given up with this object

    @property
    def step(self) -> int:
        return self.state.get("step", 0)


def prepare(config: Config, fingerprint: str, ranks: Ranks) -> RunFolder:
    """Find where the run goes on, refuse what changed, and write config.yaml, environment.json and a line of resume.jsonl.

    Collective. Raises UserError on every rank when the configuration or the data differ from the run's and `resume.allow`
    does not list the keys, when there are checkpoints but none is whole, or when another process works in the folder; RunError
    when the bounds of `resume` do not let it start again.
    """
    lock: list[IO] = []
    hosts = ranks.all_gather(f"{socket.gethostname()} rank {ranks.rank} {device_name(ranks.device)}")
    found = ranks.run_on_first(lambda: _prepare(config, fingerprint, ranks.world_size, hosts, lock))
    if isinstance(found, str):
        raise RunError(f"'{config.run_dir}': {found}")
    return RunFolder(*found, lock)


def _prepare(
    config: Config, fingerprint: str, world_size: int, hosts: list[str], lock: list[IO]
) -> tuple[Path, Path | None, dict] | str:
    run = Path(config.run_dir)
    try:
        run.mkdir(parents=True, exist_ok=True)
        (run / ".writable").touch()
        (run / ".writable").unlink()
    except OSError as error:
        raise UserError(f"run_dir: cannot write to '{run}': {error.strerror}; choose another folder") from None
    lock += _lock(run)
    newest, passed_over = checkpoints.newest_valid(run)
    if newest is None and passed_over:
        raise UserError(
            f"'{run}' has checkpoints but none is whole ({'; '.join(passed_over)}); remove '{run / 'checkpoints'}' to start over"
        )
    state = checkpoints.read_state(newest) if newest else {}
    changed = _changes(run, config, state, fingerprint) if newest else {}
    refused = [k for k in changed if not any(k == a or k.startswith(f"{a}.") for a in config.resume.allow)]
    if refused:
        told = "; ".join(f"{k}: {changed[k][0]!r} -> {changed[k][1]!r}" for k in refused)
        raise UserError(
            f"'{run}' was started with other settings ({told}); restore them, list the keys in resume.allow, or choose another run_dir"
        )
    refused = history.why_not_restart(run, config.resume, state.get("step", 0))
    if refused:
        return refused
    _write(run / CONFIG, settings.dump(config))
    _write(run / ENVIRONMENT, json.dumps(environment(hosts), indent=1) + "\n")
    shutil.rmtree(run / HEARTBEATS, ignore_errors=True)  # of an earlier start
    start = {
        "step": state.get("step", 0),
        "checkpoint": newest.name if newest else None,
        "world_size": world_size,
        "passed_over": passed_over,
        "changed": {k: list(v) for k, v in changed.items()},
    }
    history.record_start(run, start)
    return run, newest, state


def _lock(run: Path) -> list[IO]:
    """The run's lock, held as long as the file is open; nothing where the file system knows no locks."""
    # A lock by fcntl belongs to the process alone: loader workers that outlive it for a moment do not hold it.
    file = (run / LOCK).open("a+")
    end = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return []
        if time.monotonic() > end:
            file.seek(0)
            raise UserError(
                f"run_dir: '{run}' is in use by {file.read().strip() or 'another process'}; wait for it to end, end it, or choose another folder"
            )
        time.sleep(0.5)
    file.truncate(0)
    file.write(f"{socket.gethostname()} process {os.getpid()}")
    file.flush()
    return [file]


def _changes(run: Path, config: Config, state: dict, fingerprint: str) -> dict[str, tuple]:
    stored = settings.load(run / CONFIG) if (run / CONFIG).is_file() else config
    changed = settings.differences(stored, config)
    if state.get("data_fingerprint") != fingerprint:
        changed["data.fingerprint"] = (state.get("data_fingerprint"), fingerprint)
    return changed


def _write(path: Path, text: str) -> None:
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)
