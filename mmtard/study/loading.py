"""A study's YAML file and `key.sub=value` overrides to a validated study; bad input is one `UserError` of one line."""

from __future__ import annotations

import difflib
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from .. import resources
from ..config.values import shorten
from ..config.yaml_tree import check_tree, override, read_tree
from ..errors import UserError, unknown_name
from .schema import Study

MOST_FAULTS = 10  # that one message lists
NAMED = ("pretrain", "models", "methods", "validation", "evaluations")  # sections that are names and what they mean
FILE = "study.yaml"  # in the study's folder: the study as it was last started


def load(path: Path, overrides: list[str] = (), out: Path | None = None) -> Study:
    """The study of a YAML file, `{study}` and `{source}` filled in.

    overrides: `key.sub=value`. out: another folder than the file's. Raises UserError for an unreadable file, an unknown
    key with the nearest known one, or a value that does not fit.
    """
    tree = read_tree(Path(path))
    for text in overrides:
        _override(tree, text)
    if out is not None:
        tree["out"] = str(out)
    return validate(tree)


def validate(tree: dict) -> Study:
    """The study of a plain dict. A key, a method, a model or an evaluation that is null counts as left out.

    Raises UserError that names each bad key.
    """
    check_tree(tree, "the study")
    tree = {key: _without_null(value) if key in NAMED else value for key, value in tree.items() if value is not None}
    folder, made = tree.get("out"), tree.get("data")
    source = made.get("source") if isinstance(made, dict) else None
    known = {"study": folder, "source": source}
    tree = _filled(tree, {name: value for name, value in known.items() if isinstance(value, str)})
    try:
        return Study.model_validate(tree)
    except ValidationError as error:
        faults = [_explain(e) for e in error.errors()]
    more = f"; and {len(faults) - MOST_FAULTS} more" if len(faults) > MOST_FAULTS else ""
    raise UserError("; ".join(faults[:MOST_FAULTS]) + more)


def dump(study: Study) -> str:
    """The study as YAML; `load` of this text gives an equal study."""
    return _as_yaml(study.model_dump(mode="json"))


def is_own(file: Path) -> bool:
    """Whether a study's file is as `dump` writes it: without comments, and in one form, whatever version wrote it."""
    try:
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        return bool(text) and _as_yaml(yaml.safe_load(text)) == text
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return False


def _as_yaml(tree: Any) -> str:
    return yaml.safe_dump(tree, sort_keys=False, width=120, allow_unicode=True)


def find_study(text: str | Path) -> Path:
    """The file that a path, or the name of one of mmtard's own studies, means. Raises UserError for an unknown name."""
    path, name = Path(text), str(text)
    if path.is_file() or path.is_absolute():
        return path
    own = resources.studies()
    known = own.get(name.removeprefix("configs/").removeprefix("studies/").removesuffix(".yaml"))
    if known is not None:
        return known
    if "/" in name or path.suffix:
        return path
    raise unknown_name("study", name, own)


def _override(tree: dict, text: str) -> None:
    """Set one `key.sub=value`. What follows `grid.tune.` is one key, whose dots belong to it."""
    key, sep, _ = text.partition("=")
    tuned = key.removeprefix("grid.tune.")
    if sep and tuned != key and tuned:
        one: dict = {}
        override(one, f"values{text[len(key) :]}")
        tree.setdefault("grid", {}).setdefault("tune", {})[tuned] = one["values"]
    else:
        override(tree, text)


def _without_null(section: Any) -> Any:
    return {name: sub for name, sub in section.items() if sub is not None} if isinstance(section, dict) else section


def _filled(value: Any, known: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _filled(sub, known) for key, sub in value.items()}
    if isinstance(value, list):
        return [_filled(sub, known) for sub in value]
    if isinstance(value, str):
        for name, text in known.items():
            value = value.replace(f"{{{name}}}", text)
    return value


def _explain(error: dict) -> str:
    """One of pydantic's errors as `key: value: what is wrong`, with the keys that the user wrote."""
    # The name of a union's member is no key of the user's.
    place = [str(part) for part in error["loc"] if not str(part).startswith(("function-", "constrained-", "literal["))]
    key, value = ".".join(place), error["input"]
    if error["type"] == "extra_forbidden":
        known = list(_section(error["loc"][:-1]).model_fields)
        near = difflib.get_close_matches(place[-1], known, n=1)
        hint = f"did you mean '{'.'.join([*place[:-1], near[0]])}'?" if near else f"known: {', '.join(known)}"
        return f"unknown key {shorten(key)}; {hint}"
    if error["type"] == "missing":
        return f"{key}: this setting is required"
    if error["type"] == "string_pattern_mismatch":
        return f"{key}: {shorten(value)} is no name; write letters, digits, '_', '-', '.', '+'"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return message if not key or message.startswith(key) else f"{key}: {message}"
    shown = str(value) if isinstance(value, Fraction) else shorten(value)
    return f"{key}: {shown}: {message[0].lower() + message[1:]}"


def _section(loc: tuple) -> type[BaseModel]:
    """The class of the section at a place."""
    found: Any = Study
    for part in loc:
        if isinstance(found, type) and issubclass(found, BaseModel):
            found = found.model_fields[part].annotation
        else:  # a name in a dict of sections
            found = get_args(found)[-1]
        options = [o for o in get_args(found) if isinstance(o, type) and issubclass(o, BaseModel)]
        if type(None) in get_args(found) and options:
            found = options[0]
    return found
