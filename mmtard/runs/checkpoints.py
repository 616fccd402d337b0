"""Checkpoints: written beside the loop, published by rename, verified before use. What is stored is opaque here.

A run folder holds `checkpoints/step-N/` and the link `checkpoints/latest`. A checkpoint folder holds `weights.safetensors`
(float32, by parameter name), `optimizer.safetensors` (by `<state>.<parameter name>`), `state.json` and, written last, `manifest.json` with every file's size and
SHA-256. It is independent of world size and ZeRO stage.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import UserError

FORMAT = 1
MANIFEST, WEIGHTS, OPTIMIZER, STATE = "manifest.json", "weights.safetensors", "optimizer.safetensors", "state.json"
EMA = "ema."  # how the optimiser's keys of the moving average begin
MOST_ROBUST = "most_robust"  # the link to the checkpoint that probes found so
_PUBLISHED = re.compile(r"step-(\d+)$")


class Checkpoints:
    """The checkpoints of one run, as its first rank writes them.

    keep_last: how many of the newest stay; keep_every: those at multiples of this step stay for good. The target of the link
    `checkpoints/most_robust` stays, and so does what is held.
    """

    def __init__(self, run: Path, keep_last: int, keep_every: int | None = None):
        self.folder = run / "checkpoints"
        self.keep_last, self.keep_every = keep_last, keep_every
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None
        self._held: set[int] = set()
        self._deciding = threading.Lock()  # what goes; never taken while files are written or removed

    def clean(self) -> None:
        """Remove what an interrupted write or removal left behind."""
        for pattern in (".writing-*", ".retired-*"):
            for scratch in self.folder.glob(pattern):
                shutil.rmtree(scratch, ignore_errors=True)

    def save(self, step: int, weights: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict) -> None:
        """Write and publish `step-N` in the background. The tensors must be CPU copies that nobody changes afterwards.

        Waits for the previous write first; raises what that write raised.
        """
        self.wait()
        self._writer = threading.Thread(target=self._write, args=(step, weights, optimizer, state), name="checkpoint")
        self._writer.start()

    def wait(self) -> None:
        """Block until the write under way is published; raise UserError if it failed."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._error is not None:
            error, self._error = self._error, None
            raise UserError(
                f"checkpoint could not be written to '{self.folder}': {error}; free space or correct the folder, then start again"
            ) from error

    def _write(self, step, weights, optimizer, state) -> None:
        try:
            scratch = self.folder / f".writing-{step}-{os.getpid()}"
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            (scratch / STATE).write_text(json.dumps(state, indent=1))
            save_tensors(weights, scratch / WEIGHTS)
            save_tensors(optimizer, scratch / OPTIMIZER)
            files = {
                name: {"bytes": (scratch / name).stat().st_size, "sha256": _sha256(scratch / name)}
                for name in (WEIGHTS, OPTIMIZER, STATE)
            }
            (scratch / MANIFEST).write_text(json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1))
            for path in (*scratch.iterdir(), scratch):
                _fsync(path)
            final = self.folder / f"step-{step}"
            shutil.rmtree(final, ignore_errors=True)  # an earlier, invalid one of the same step
            scratch.rename(final)
            _fsync(self.folder)
            _point(self.folder / "latest", final.name)
            self._delete_old(step)
        except BaseException as error:  # handed to the loop by wait(): a thread has nobody else to tell
            self._error = error

    def protect(self, step: int) -> Path | None:
        """The published checkpoint of a step, which then stays until it is released; None when there is none."""
        with self._deciding:
            checkpoint = self.folder / f"step-{step}"
            if not checkpoint.is_dir():
                return None
            self._held.add(step)
            return checkpoint

    def release(self, step: int) -> None:
        self._held.discard(step)

    def keep_most_robust(self, step: int | None, newest: int) -> None:
        """Point `most_robust` at a step's checkpoint; None: remove the link if its target is gone or beyond the step `newest`."""
        link = self.folder / MOST_ROBUST
        if step is not None:
            _point(link, f"step-{step}")
        elif (target := self._most_robust) is not None and (target > newest or not link.exists()):
            link.unlink()

    @property
    def _most_robust(self) -> int | None:
        link = self.folder / MOST_ROBUST
        return int(os.readlink(link).removeprefix("step-")) if link.is_symlink() else None

    def delete_old(self) -> None:
        """Remove the checkpoints that need not stay."""
        self._delete_old(max(published(self.folder), default=0))

    def _delete_old(self, newest: int) -> None:
        with self._deciding:
            stay = {self._most_robust, *self._held}
            for n in sorted(n for n in published(self.folder) if n <= newest)[: -self.keep_last]:
                if n not in stay and not (self.keep_every and n % self.keep_every == 0):
                    (self.folder / f"step-{n}").rename(self.folder / f".retired-{n}")
        for retired in self.folder.glob(".retired-*"):
            shutil.rmtree(retired, ignore_errors=True)


def published(folder: Path) -> dict[int, Path]:
    """Step -> folder of every published checkpoint under `checkpoints/`, valid or not."""
    found = ((_PUBLISHED.match(p.name), p) for p in folder.glob("step-*")) if folder.is_dir() else ()
    return {int(m[1]): p for m, p in found if m}


def why_invalid(checkpoint: Path) -> str | None:
    """Why a checkpoint must not be used, or None when every file is there with its size and checksum."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            return f"{checkpoint.name}: format {manifest['format']}, this version reads {FORMAT}"
        for name, expected in manifest["files"].items():
            path = checkpoint / name
            if not path.is_file():
                return f"{checkpoint.name}: {name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{checkpoint.name}: {name} has {path.stat().st_size} bytes, not {expected['bytes']}"
            if _sha256(path) != expected["sha256"]:
                return f"{checkpoint.name}: {name} does not match its checksum"
    except FileNotFoundError:
        return f"{checkpoint.name}: no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{checkpoint.name}: unreadable {MANIFEST} ({error})"
    return None


def newest_valid(run: Path) -> tuple[Path | None, list[str]]:
    """(the newest checkpoint of a run that is whole or None, why each newer one was passed over)."""
    passed_over = []
    for _, checkpoint in sorted(published(run / "checkpoints").items(), reverse=True):
        why = why_invalid(checkpoint)
        if why is None:
            return checkpoint, passed_over
        passed_over.append(why)
    return None, passed_over


def resolve(folder: Path) -> tuple[Path, Path]:
    """(run folder, checkpoint folder) of a run (its newest valid checkpoint), a checkpoint, or a link to one (`checkpoints/latest`, `most_robust`).

    Raises UserError when the folder is neither or holds no usable checkpoint.
    """
    folder = folder.resolve()
    if _PUBLISHED.match(folder.name) and folder.parent.name == "checkpoints":
        why = why_invalid(folder)
        if why is not None:
            raise UserError(f"checkpoint '{folder}' cannot be used: {why}")
        return folder.parent.parent, folder
    checkpoint, passed_over = newest_valid(folder)
    if checkpoint is None:
        detail = f" ({'; '.join(passed_over)})" if passed_over else ""
        raise UserError(
            f"'{folder}' is no run, checkpoint or exported folder with usable weights{detail}; give one that is"
        )
    return folder, checkpoint


def read_weights(checkpoint: Path, ema: bool = False) -> dict[str, Tensor]:
    """The student's float32 weights by name; ema: their moving average, with the buffers as they are.

    Raises UserError when the run kept no average.
    """
    weights = load_file(checkpoint / WEIGHTS)
    if not ema:
        return weights
    with safe_open(checkpoint / OPTIMIZER, "pt") as file:
        averages = {key.removeprefix(EMA): file.get_tensor(key) for key in file.keys() if key.startswith(EMA)}
    if not averages:
        raise UserError(
            f"'{checkpoint}' holds no moving average of the weights: its run had no train.ema; take the weights themselves"
        )
    return weights | averages


def read_optimizer(checkpoint: Path) -> dict[str, Tensor]:
    """The optimiser's tensors by `<state>.<parameter name>`."""
    return load_file(checkpoint / OPTIMIZER)


def read_state(checkpoint: Path) -> dict:
    return json.loads((checkpoint / STATE).read_text())


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all, that the user's group can read as their umask says."""
    scratch = path.with_name(path.name + ".tmp")
    scratch.touch()
    mode = scratch.stat().st_mode
    save_file(tensors, scratch, metadata)
    scratch.chmod(mode)  # safetensors itself leaves a file for the owner alone
    scratch.replace(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _point(link: Path, target: str) -> None:
    scratch = link.with_name(f".{link.name}-{os.getpid()}")
    scratch.unlink(missing_ok=True)
    scratch.symlink_to(target)
    scratch.replace(link)
