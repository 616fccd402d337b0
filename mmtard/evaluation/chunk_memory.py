"""Where the attack of a chunk is, on disk: a job that is stopped in the middle of hours of work goes on there."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..attacks.memory import AttackMemory
from ..distributed.interruption import StoppedWithin
from ..runs.checkpoints import save_tensors
from .graphs import Graphs

SAVE_EVERY_S = 600.0  # what a process that is killed without a warning loses at most


class ChunkMemory:
    """One attack on one chunk: the batches that are done, and the snapshot of the one under way.

    It is written to `path` when the attack is stopped, and now and then before. A file that cannot be read or written
    costs the work of the chunk so far, and no more. graphs: are told whether they computed what is kept.
    """

    def __init__(self, path: Path, say: Callable, graphs: Graphs | None = None):
        self.path, self.say, self.graphs = path, say, graphs
        self._saved = time.monotonic()
        self._now: AttackMemory | None = None
        self._done, self._kept = self._read()

    def batch(self, seeds: Tensor, attack: Callable[[AttackMemory], dict]) -> dict:
        """The row of a batch: as an earlier process kept it, else `attack(memory)`. Raises StoppedWithin, all kept."""
        key = f"{int(seeds[0])} {len(seeds)}"
        if key not in self._done:
            kept, self._kept = self._kept, None
            self._now = AttackMemory(kept, self._now_and_then)
            try:
                self._done[key] = attack(self._now)
            except StoppedWithin:
                self._write()
                raise
            self._now = None
        return self._done[key]

    def _now_and_then(self) -> None:
        if time.monotonic() - self._saved > SAVE_EVERY_S:
            self._write()

    def _write(self) -> None:
        # Clones, since safetensors takes no two tensors of one storage.
        tensors = {k: t.detach().cpu().clone() for k, t in (self._now.snapshot() if self._now else {}).items()}
        if not tensors and not self._done:
            return
        metadata = {"done": json.dumps(self._done)}
        if self.graphs:
            metadata["compiled"] = json.dumps(self.graphs.compiled())
        try:
            save_tensors(tensors, self.path, metadata)
        except OSError as error:
            reason = error.strerror or error
            self.say(f"'{self.path}': cannot write it ({reason}); this chunk's attack will begin anew")
        self._saved = time.monotonic()

    def _read(self) -> tuple[dict[str, dict], dict[str, Tensor] | None]:
        if not self.path.is_file():
            return {}, None
        try:
            with safe_open(self.path, "pt") as file:
                done = json.loads(file.metadata()["done"])
                compiled = json.loads(file.metadata().get("compiled", "false"))
                kept: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            self.say(f"'{self.path}' is damaged ({error}); this chunk's attack begins anew")
            return {}, None
        if self.graphs:
            self.graphs.go_on(compiled)
        return done, kept or None
