"""Checkpoints as a run writes them: in the background, published by rename, and retired when newer ones are there."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..files import FULL, discard, free_space, size_in_words, write_text
from . import checkpoints
from .checkpoints import why_invalid
from .checksums import describe
from .layout import CHECKPOINTS, LATEST, MOST_ROBUST
from .manifest import FILES, FORMAT, MANIFEST, OPTIMIZER, STATE, WEIGHTS, published

MARGIN_BYTES = 2**20  # beside the tensors: the headers, the state, the manifest


class Checkpoints:
    """The checkpoints of one run, as its first rank writes them.

    keep_last: how many of the newest stay; keep_every: those at multiples of this step stay for good. The target of
    the link `checkpoints/most_robust` stays, and so does what is protected. Where the disk is short of room for a new
    checkpoint, the oldest one that would go after it goes before it; one whole checkpoint always stays.
    """

    def __init__(self, run: Path, keep_last: int, keep_every: int | None = None):
        self.run, self.folder = run, run / CHECKPOINTS
        self.keep_last, self.keep_every = keep_last, keep_every
        self._opened = _identity(run)
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None
        self._needed = 0  # bytes of the newest checkpoint
        self._saved: int | None = None  # the newest step that this start has published
        self._protected: set[int] = set()
        # Guards the choice of which checkpoints go. Not held during file I/O, so protect() never waits for a disk.
        self._deciding = threading.Lock()

    def clean(self) -> None:
        """Remove what an interrupted write or removal left behind."""
        for pattern in (".writing-*", ".retired-*"):
            for scratch in self.folder.glob(pattern):
                discard(scratch)

    def save(
        self,
        step: int,
        weights: dict[str, Tensor],
        optimizer: dict[str, Tensor],
        state: dict,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        """Write and publish `step-N` in the background. The tensors must be CPU copies that nobody changes afterwards.

        before: called there when all is written and nothing published; where it raises, nothing is. Waits for the
        previous write first; raises what that write raised. Raises UserError when the run's folder is gone.
        """
        self.wait()
        if _identity(self.run) != self._opened:
            raise UserError(
                f"run_dir: '{self.run}' was moved, removed or replaced while the run went on, so step {step} "
                "cannot be saved; start the run again where its checkpoints are"
            )
        args = (step, weights, optimizer, state, before)
        self._writer = threading.Thread(target=self._write, args=args, name="checkpoint")
        self._writer.start()

    @property
    def is_writing(self) -> bool:
        """Whether a write is under way."""
        return self._writer is not None and self._writer.is_alive()

    def wait(self) -> None:
        """Block until the write under way is published; raise UserError if it failed."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        failure = self.failure
        if failure is not None:
            self._error = None
            raise failure

    @property
    def failure(self) -> UserError | None:
        """Why the newest write failed, as soon as it did; None where it did not, or is still under way."""
        error = self._error
        if error is None or isinstance(error, UserError):
            return error
        room = ""
        if isinstance(error, OSError) and error.errno in FULL:
            room = f" ({free_space(self.folder)}, a checkpoint takes {size_in_words(self._needed)})"
        return UserError(
            f"checkpoint could not be written to '{self.folder}': {error}; "
            f"free space or correct the folder, then start again{room}"
        )

    def protect(self, step: int) -> Path | None:
        """The published checkpoint of a step, which then stays until it is released; None when there is none."""
        with self._deciding:
            checkpoint = self.folder / f"step-{step}"
            if not checkpoint.is_dir():
                return None
            self._protected.add(step)
            return checkpoint

    def release(self, step: int) -> None:
        """Let a protected checkpoint go when newer ones are there."""
        self._protected.discard(step)

    def keep_most_robust(self, step: int | None, newest: int) -> None:
        """Point `most_robust` at a step's checkpoint.

        None: remove the link if its target is gone or beyond the step `newest`.
        """
        link = self.folder / MOST_ROBUST
        target = self.most_robust
        if step is not None:
            point(link, f"step-{step}")
        elif target is not None and (target > newest or not (self.folder / f"step-{target}").exists()):
            discard(link)

    @property
    def most_robust(self) -> int | None:
        """The step that the link `most_robust` points at; None without one."""
        return step_of(self.folder / MOST_ROBUST)

    def delete_old(self) -> None:
        """Remove the checkpoints that need not stay: none beyond the newest whole one, where the run goes on."""
        newest = self._saved or self._newest_whole()
        if newest is not None:
            self._delete_old(newest, self.keep_last)

    # ---------------------------------------------------------------- in the background

    def _write(self, step: int, weights: dict, optimizer: dict, state: dict, before: Callable[[], None]) -> None:
        scratch = self.folder / f".writing-{step}-{os.getpid()}"
        try:
            _refuse_non_finite(step, weights)
            discard(scratch)
            scratch.mkdir(parents=True)
            self._make_room(step, [*weights.values(), *optimizer.values()])
            self._write_files(scratch, step, weights, optimizer, state)
            before()
            final = self.folder / f"step-{step}"
            discard(final)  # an earlier, invalid one of the same step
            scratch.rename(final)
            _fsync(self.folder)
            point(self.folder / LATEST, final.name)
            self._saved = step
            self._delete_old(step, self.keep_last)
        except BaseException as error:  # handed to the loop by wait(): a thread has nobody else to tell
            self._error = error
            shutil.rmtree(scratch, ignore_errors=True)

    def _write_files(self, scratch: Path, step: int, weights: dict, optimizer: dict, state: dict) -> None:
        (scratch / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        checkpoints.save_tensors(weights, scratch / WEIGHTS)
        checkpoints.save_tensors(optimizer, scratch / OPTIMIZER)
        manifest = {"format": FORMAT, "step": step, "files": {name: describe(scratch / name) for name in FILES}}
        (scratch / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in (*scratch.iterdir(), scratch):
            _fsync(path)

    def _make_room(self, step: int, tensors: list[Tensor]) -> None:
        """Where the disk is too full for a new checkpoint, retire what would go after it; OSError if it still is."""
        self._needed = sum(tensor.nbytes for tensor in tensors) + MARGIN_BYTES
        if self._has_room():
            return
        self._delete_old(step, max(1, self.keep_last - 1), also={self._newest_whole()})
        if not self._has_room():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _has_room(self) -> bool:
        usage = shutil.disk_usage(self.folder)
        return usage.total == 0 or usage.free >= self._needed  # some network file systems count nothing

    def _newest_whole(self) -> int | None:
        return next((n for n in sorted(published(self.folder), reverse=True) if not self._why_invalid(n)), None)

    def _why_invalid(self, step: int) -> str | None:
        return why_invalid(self.folder / f"step-{step}")

    def _delete_old(self, newest: int, keep: int, also: set[int | None] | None = None) -> None:
        with self._deciding:
            stay = {self.most_robust, *self._protected, *(also or ())}
            for n in sorted(n for n in published(self.folder) if n <= newest)[:-keep]:
                if n not in stay and not (self.keep_every and n % self.keep_every == 0):
                    retired = self.folder / f".retired-{n}"
                    discard(retired)
                    (self.folder / f"step-{n}").rename(retired)
        for retired in self.folder.glob(".retired-*"):
            discard(retired)


def point(link: Path, target: str) -> None:
    """Let `link` point at its neighbour `target`, also where a copy of the run made a folder or a file of the link.

    On a file system without links, a file that holds the target's name takes its place.
    """
    scratch = link.with_name(f".{link.name}-{os.getpid()}")
    discard(scratch)
    if link.is_dir() and not link.is_symlink():
        if {path.name for path in link.iterdir()} - {MANIFEST, *FILES}:
            raise OSError(errno.EEXIST, f"'{link}' is a folder with other files than a checkpoint's; move it away")
        discard(link)
    try:
        scratch.symlink_to(target)
    except OSError:
        write_text(link, f"{target}\n")
    else:
        scratch.replace(link)


def step_of(link: Path) -> int | None:
    """The step that `latest` or `most_robust` points at, in whatever form a file system keeps it; None without one."""
    try:
        if link.is_symlink():
            name = os.readlink(link)
        elif link.is_dir():
            return int(json.loads((link / MANIFEST).read_text(encoding="utf-8"))["step"])
        else:
            name = link.read_text(encoding="utf-8").strip()
        return int(name.removeprefix("step-"))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _refuse_non_finite(step: int, weights: dict[str, Tensor]) -> None:
    bad = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise UserError(
            f"step {step}: the weights are not finite ({bad[0]}{more}), so they are not saved; "
            "lower train.lr, then go on from the last checkpoint"
        )


def _identity(run: Path) -> tuple[int, int] | None:
    """What tells a folder from another one that was put in its place; None where there is none."""
    try:
        found = run.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
