"""YAML files and `key.sub=value` overrides to a validated configuration.

Bad input is one `UserError` that names key, value and remedy.
"""

from __future__ import annotations

import difflib
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from ..errors import UserError
from .methods import METHODS
from .models import Teacher
from .schema import Config
from .values import shorten
from .yaml_tree import check_tree, override, read_tree

T = TypeVar("T", bound=BaseModel)
MOST_FAULTS = 10  # that one message lists


def load(path: str | Path, overrides: list[str] = ()) -> Config:
    """The validated configuration of a YAML file (with its `base:` files) and `key.sub=value` overrides.

    Another `method.name` leaves the settings of the file's method behind. Raises UserError for an unreadable file, an
    unknown key (with the nearest known one), or a value that does not fit.
    """
    tree = read_tree(Path(path))
    for text in sorted(overrides, key=lambda text: not text.startswith("method.name=")):
        override(tree, text)
    return validate(tree)


def validate(tree: dict) -> Config:
    """The configuration of a plain dict. A section or teacher that is null counts as left out.

    Raises UserError that names each bad key.
    """
    check_tree(tree, "the configuration")
    if isinstance(tree.get("teachers"), dict):
        tree = {**tree, "teachers": {k: v for k, v in tree["teachers"].items() if v is not None}}
    try:
        return Config.model_validate({k: v for k, v in tree.items() if v is not None})
    except ValidationError as error:
        faults = [_explain(e) for e in error.errors()]
    more = f"; and {len(faults) - MOST_FAULTS} more" if len(faults) > MOST_FAULTS else ""
    raise UserError("; ".join(faults[:MOST_FAULTS]) + more)


def section(kind: type[T], **values) -> T:
    """A section of a configuration (`Data`, `Model`) from values that were found, such as paths of a folder's files.

    Raises UserError that names each bad key.
    """
    try:
        return kind(**values)
    except ValidationError as error:
        raise UserError("; ".join(_explain(e) for e in error.errors()[:1])) from None


def dump(config: Config) -> str:
    """The resolved configuration as YAML; `load` of this text gives an equal configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=120, allow_unicode=True)


def differences(old: Config, new: Config) -> dict[str, tuple]:
    """Dotted key -> (old, new) where two configurations differ; `resume`, `log`, `probe` and `run_dir` do not count."""
    a, b = (_flatten(c.model_dump(mode="json")) for c in (old, new))
    keys = (k for k in sorted(a.keys() | b.keys()) if k.split(".")[0] not in ("resume", "log", "probe", "run_dir"))
    return {k: (a.get(k), b.get(k)) for k in keys if a.get(k) != b.get(k)}


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    flat = {}
    for name, sub in tree.items():
        flat |= _flatten(sub, f"{prefix}.{name}" if prefix else name)
    return flat


def _explain(error: dict) -> str:
    """One of pydantic's errors as `key: value: what is wrong`, with the keys that the user wrote."""
    place, kind = _written_place(error["loc"]), error["type"]
    key, value = ".".join(place), error["input"]
    if kind == "extra_forbidden":
        return _unknown_key(place, _known_keys(error["loc"][:-1]))
    if kind == "missing":
        return f"{key}: this setting is required"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        name = value.get("name") if isinstance(value, dict) else value
        return f"method.name: unknown method {shorten(name)}; known: {', '.join(METHODS)}"
    if kind == "model_type":
        keys = ", ".join(_known_keys(error["loc"]))
        return f"{key}: {shorten(value)} is no section; give it keys: {key}.KEY=VALUE, with KEY of {keys}"
    if kind in ("dict_type", "model_attributes_type"):
        name = "name" if key == "method" else "NAME"
        return f"{key}: {shorten(value)} stands where keys do; write {key}.{name}=VALUE"
    message = error["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return message if not key or message.startswith(key) else f"{key}: {message}"
    shown = str(value) if isinstance(value, Fraction) else repr(value)
    shown = shown if len(shown) <= 200 else f"{shown[:190]}..."
    return f"{key}: {shown}: {message[0].lower() + message[1:]}"


def _written_place(loc: tuple) -> list[str]:
    place = [str(part) for part in loc]
    if place[:1] == ["method"] and len(place) > 1 and place[1] in METHODS:
        del place[1]  # pydantic names the union's member; the user wrote no such key
    # Nor the members of a union of a text and a list of texts.
    return [part for part in place if not part.startswith(("function-after[", "constrained-str", "list["))]


def _unknown_key(place: list[str], known: list[str]) -> str:
    *section, name = place
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"unknown key {shorten('.'.join(place))}; did you mean '{'.'.join([*section, near[0]])}'?"
    where = f" in {'.'.join(section)}" if section else ""
    return f"unknown key {shorten('.'.join(place))}; known keys{where}: {', '.join(known)}"


def _known_keys(loc: tuple) -> list[str]:
    section: Any = Config
    for part in loc:
        if isinstance(section, dict):  # the name of a method or a teacher
            section = section.get(part, Teacher)
        elif part in ("method", "teachers"):
            section = METHODS if part == "method" else {}
        else:
            annotation = section.model_fields[part].annotation
            section = (get_args(annotation) or (annotation,))[0]  # of a section that may be null, the section
    return list(section.model_fields)
