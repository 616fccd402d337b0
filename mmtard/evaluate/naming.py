"""How files and folders are named after what decides their content."""

from __future__ import annotations

import hashlib
import json
import re


def digest(settings: dict) -> str:
    """16 hex digits that change with any setting."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def slug(text: str) -> str:
    """The text as part of a file's name: 2/255 -> 2_255."""
    return re.sub(r"[^\w.+=-]+", "_", text)
