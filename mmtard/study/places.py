"""The places that a study's texts name, looked at before anything is made."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError
from .schema import START, Study


def refuse_unknown_places(study: Study) -> None:
    """Raise UserError for a path that begins with an unknown `{name}`, or with a part that the study does not make."""
    made = {"pretrained": [*study.pretrain], "models": [START, *study.models]}
    for place, text in _texts(study.model_dump(mode="json")):
        unknown = re.match(r"\{\w+\}(?=/)", text)
        if unknown and unknown[0] not in ("{study}", "{source}"):
            raise UserError(f"{place}: '{text}': {unknown[0]} is not known; write {{study}} or {{source}}")
        if not Path(text).is_relative_to(study.out):
            continue
        part, name = (*Path(text).relative_to(study.out).parts, "", "")[:2]
        if name and name not in made.get(part, [name]):
            section = {"pretrained": "pretrain"}.get(part, part)
            raise UserError(f"{place}: '{text}': no '{name}' in {section}; there is {', '.join(made[part]) or 'none'}")


def _texts(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every text."""
    if isinstance(value, dict):
        for key, sub in value.items():
            yield from _texts(sub, f"{place}.{key}".lstrip("."))
    elif isinstance(value, list):
        for sub in value:
            yield from _texts(sub, place)
    elif isinstance(value, str):
        yield place, value
