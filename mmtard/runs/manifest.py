"""The checkpoints of a run as their names and manifests tell of them, found in no time and without torch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from .layout import CHECKPOINTS

FORMAT = 1
MANIFEST, WEIGHTS, OPTIMIZER, STATE = "manifest.json", "weights.safetensors", "optimizer.safetensors", "state.json"
FILES = (WEIGHTS, OPTIMIZER, STATE)
TRIES = 20  # at reading the newest checkpoint of a run that goes on, and may retire it meanwhile
PUBLISHED = re.compile(r"step-(0|[1-9]\d{0,17})$")
WRONG = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)  # what reading a damaged one raises


def published(folder: Path) -> dict[int, Path]:
    """Step -> folder of every published checkpoint under `checkpoints/`, valid or not."""
    matches = ((PUBLISHED.match(path.name), path) for path in folder.glob("step-*")) if folder.is_dir() else ()
    return {int(match[1]): path for match, path in matches if match}


def why_of_other_size(checkpoint: Path) -> str | None:
    """Why a checkpoint must not be used, as far as the files' sizes tell; None when each is as its manifest says."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return f"{checkpoint.name}: format {manifest['format']!r:.40}, this version reads {FORMAT}"
        for name in FILES:
            if (reason := _why(checkpoint / name, manifest["files"][name])) is not None:
                return f"{checkpoint.name}: {name} {reason}"
    except FileNotFoundError:
        return f"{checkpoint.name}: no {MANIFEST}"
    except WRONG as error:
        return why_unreadable(checkpoint, error)
    return None


def why_unreadable(checkpoint: Path, error: Exception) -> str:
    """What is said of a checkpoint whose manifest makes no sense."""
    return f"{checkpoint.name}: unreadable {MANIFEST} ({' '.join(str(error).split())[:200]})"


def newest(run: Path, why: Callable[[Path], str | None] = why_of_other_size) -> tuple[Path | None, list[str]]:
    """(the newest checkpoint of a run that nothing is said against or None, why each newer one was passed over)."""
    passed_over: list[str] = []
    for _ in range(TRIES):
        passed_over = []
        listed = sorted(published(run / CHECKPOINTS).items(), reverse=True)
        for _, checkpoint in listed:
            reason = why(checkpoint)
            if reason is None:
                return checkpoint, passed_over
            passed_over.append(reason)
        if all(checkpoint.exists() for _, checkpoint in listed):
            break  # else some were retired while they were read, and newer ones are there
    return None, passed_over


def _why(path: Path, expected: dict) -> str | None:
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    return None if size == expected["bytes"] else f"has {size} bytes, not {expected['bytes']!r:.40}"
