"""Records of settings and events: JSON lines that may end cut, digests, and names made of settings."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path


def read_json_lines(path: Path) -> list[dict]:
    """The objects of a file of JSON lines, in order; [] where there is no file.

    A line that is not JSON is left out: the last one of a process that was killed, or one that was damaged since.
    """
    try:
        return json_objects(Path(path).read_bytes().splitlines())
    except FileNotFoundError:
        return []


def json_objects(lines: Iterable[bytes]) -> list[dict]:
    """The objects that the lines are, in order; a line that is none is left out."""
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def settings_digest(settings: dict) -> str:
    """16 hex digits that change with any setting."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


DIGEST = "digest"


def sealed(record: dict) -> dict:
    """The record with a digest of all that is in it, as it reads once it was written as JSON."""
    return {**record, DIGEST: settings_digest(json.loads(json.dumps(record)))}


def opened(record: dict) -> tuple[dict, bool]:
    """(a record without its digest, whether that is right or there is none, as in files of earlier versions)."""
    content = {key: value for key, value in record.items() if key != DIGEST}
    return content, DIGEST not in record or record[DIGEST] == settings_digest(content)


def slug(text: str) -> str:
    """The text as part of a file's name: 2/255 -> 2_255."""
    return re.sub(r"[^\w.+=-]+", "_", text)
