"""Checkpoints as they are read: found, verified before use, and what they hold. `checkpoint_writer` writes them.

A run folder holds `checkpoints/step-N/` and the link `checkpoints/latest`. A checkpoint folder holds
`weights.safetensors` (float32, by parameter name), `optimizer.safetensors` (by `<state>.<parameter name>`),
`state.json` and, written last, `manifest.json` with every file's size and SHA-256. It is independent of world size and
ZeRO stage. What is stored is opaque here.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import UserError
from ..files import publish, refuse_special
from .checksums import describe
from .layout import CHECKPOINTS, LATEST, MOST_ROBUST
from .manifest import (
    FILES,
    MANIFEST,
    OPTIMIZER,
    PUBLISHED,
    STATE,
    TRIES,
    WEIGHTS,
    WRONG,
    newest,
    published,
    why_of_other_size,
    why_unreadable,
)

EMA = "ema."  # how the optimizer's keys of the moving average begin

T = TypeVar("T")


def any_manifest(run: Path) -> bool:
    """Whether a run folder has a checkpoint that was once published, whole or not."""
    return any((path / MANIFEST).is_file() for path in published(run / CHECKPOINTS).values())


def why_invalid(checkpoint: Path) -> str | None:
    """Why a checkpoint must not be used, or None when every file is there with its size and checksum."""
    # What is quick to see comes first, so that of many damaged checkpoints not every weight is read.
    if (reason := why_of_other_size(checkpoint)) is not None:
        return reason
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        for name in (STATE, *(name for name in FILES if name != STATE)):
            if describe(checkpoint / name)["sha256"] != manifest["files"][name]["sha256"]:
                return f"{checkpoint.name}: {name} does not match its checksum"
            if name == STATE and (reason := _why_of_other_step(checkpoint, manifest["step"])) is not None:
                return reason
    except FileNotFoundError:
        return f"{checkpoint.name}: no {MANIFEST}"
    except WRONG as error:
        return why_unreadable(checkpoint, error)
    return None


def newest_valid(run: Path) -> tuple[Path | None, list[str]]:
    """(the newest checkpoint of a run that is whole or None, why each newer one was passed over)."""
    return newest(run, why_invalid)


def resolve(folder: Path) -> tuple[Path, Path]:
    """(run folder, checkpoint folder) of a run (its newest valid checkpoint), a checkpoint, or a link to one.

    The links are `checkpoints/latest` and `checkpoints/most_robust`; a copy may have made folders of them, or files
    that hold the checkpoint's name. Raises UserError when the folder is none of these or holds no usable checkpoint.
    """
    folder = folder.resolve()
    in_checkpoints = folder.parent.name == CHECKPOINTS
    if in_checkpoints and folder.name in (LATEST, MOST_ROBUST) and folder.is_file():
        folder = folder.parent / _name_in(folder)
    refuse_special(folder.parent.parent if in_checkpoints else folder)
    if in_checkpoints and (PUBLISHED.match(folder.name) or (folder / MANIFEST).is_file()):
        reason = why_invalid(folder)
        if reason is not None:
            raise UserError(f"checkpoint '{folder}' cannot be used: {reason}")
        return folder.parent.parent, folder
    checkpoint, passed_over = newest_valid(folder)
    if checkpoint is None:
        detail = f" ({'; '.join(passed_over)})" if passed_over else ""
        raise UserError(
            f"'{folder}' is no run, checkpoint or exported folder with usable weights{detail}; give one that is"
        )
    for reason in passed_over[:3]:
        _warn(f"WARN {folder}: a newer checkpoint is not whole, and {checkpoint.name} is taken: {reason}")
    return folder, checkpoint


@cache
def _warn(line: str) -> None:
    """Say a line once, however often one command resolves a folder, and by the first rank alone."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


def read_resolved(folder: Path, read: Callable[[Path, Path], T]) -> T:
    """Return `read(run, checkpoint)` of what a folder resolves to.

    A run that goes on may retire the checkpoint while it is read; then its newest one is read. Raises UserError when
    the checkpoint was asked for by its own name, or is retired time and again.
    """
    for _ in range(TRIES):
        run, checkpoint = resolve(folder)
        try:
            return read(run, checkpoint)
        except (OSError, SafetensorError) as error:
            if (checkpoint / MANIFEST).is_file():
                raise UserError(f"checkpoint '{checkpoint}' cannot be read: {' '.join(str(error).split())}") from None
    raise UserError(
        f"checkpoint '{checkpoint}' was retired while it was read: its run goes on; try again, "
        "or raise checkpoint.keep_last of the run"
    )


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
            f"'{checkpoint}' holds no moving average of the weights: its run had no train.ema; "
            "take the weights themselves"
        )
    return weights | averages


def read_optimizer(checkpoint: Path) -> dict[str, Tensor]:
    """The optimizer's tensors by `<state>.<parameter name>`."""
    return load_file(checkpoint / OPTIMIZER)


def read_state(checkpoint: Path) -> dict:
    """What the loop goes on with: step, counts, data fingerprint."""
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all, that the user's group can read as their umask says.

    Raises OSError when it cannot be written.
    """
    with publish(path) as scratch:
        scratch.touch(exist_ok=False)
        mode = scratch.stat().st_mode
        try:
            save_file(tensors, scratch, metadata)
        except SafetensorError as error:
            full = "os error 28" in str(error)
            raise OSError(
                errno.ENOSPC if full else errno.EIO, "No space left on device" if full else str(error)
            ) from None
        scratch.chmod(mode)  # safetensors itself leaves a file for the owner alone


def _why_of_other_step(checkpoint: Path, noted: int) -> str | None:
    """Why a checkpoint is not the one that its manifest or its folder's name says, by its state."""
    step = json.loads((checkpoint / STATE).read_text(encoding="utf-8")).get("step", noted)
    of_name = PUBLISHED.match(checkpoint.name)
    if step != noted or (of_name and int(of_name[1]) != step):
        return f"{checkpoint.name}: it is the checkpoint of step {step!r:.40}"
    return None


def _name_in(link: Path) -> str:
    """The checkpoint's name in a file that stands for a link, as file systems without links keep it."""
    name = link.read_bytes()[:64].decode("utf-8", "replace").strip()
    return name if PUBLISHED.fullmatch(name) else link.name
