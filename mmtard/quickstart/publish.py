"""Folders that are made once, whole or not at all, and remade only when the settings they came from change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError

SETTINGS = "settings.json"


def read_settings(folder: Path) -> dict | None:
    """What a published folder was made with; None where `folder` does not exist. Raises UserError for a folder not made here."""
    if not folder.exists():
        return None
    try:
        return json.loads((folder / SETTINGS).read_text())
    except (OSError, ValueError):
        raise UserError(f"'{folder}' exists and was not made by the quickstart; remove it or choose another folder") from None


@contextmanager
def publish(folder: Path, settings: dict) -> Iterator[Path]:
    """Yields an empty folder that takes the place of `folder`, with `settings` in it, when the block ends without an exception."""
    read_settings(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    (partial / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
