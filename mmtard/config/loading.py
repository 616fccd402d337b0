"""YAML files and `key.sub=value` overrides to a validated configuration.

Bad input is one `UserError` that names key, value and remedy.
"""

from __future__ import annotations

import difflib
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from ..errors import UserError
from .methods import METHODS
from .models import Teacher
from .schema import Config
from .values import plain_text, shorten

MOST_FAULTS = 10  # that one message lists


def load(path: str | Path, overrides: list[str] = ()) -> Config:
    """The validated configuration of a YAML file (with its `base:` files) and `key.sub=value` overrides.

    Another `method.name` leaves the settings of the file's method behind. Raises UserError for an unreadable file, an
    unknown key (with the nearest known one), or a value that does not fit.
    """
    tree = _read(Path(path), seen=())
    for text in sorted(overrides, key=lambda text: not text.startswith("method.name=")):
        key, sep, value = text.partition("=")
        if not sep or not key:
            raise UserError(f"override '{text}' is not of the form key.sub=value")
        change: Any = _scalar(value, text)
        if key == "method.name" and _another_method(tree.get("method"), {"name": change}):
            key, change = "method", {"name": change}
        _set(tree, key.split("."), change, text)
    return validate(tree)


def validate(tree: dict) -> Config:
    """The configuration of a plain dict. A section or teacher that is null counts as left out.

    Raises UserError that names each bad key.
    """
    _refuse_control_characters(tree)
    if isinstance(tree.get("teachers"), dict):
        tree = {**tree, "teachers": {k: v for k, v in tree["teachers"].items() if v is not None}}
    try:
        return Config.model_validate({k: v for k, v in tree.items() if v is not None})
    except ValidationError as error:
        faults = [_explain(e) for e in error.errors()]
    more = f"; and {len(faults) - MOST_FAULTS} more" if len(faults) > MOST_FAULTS else ""
    raise UserError("; ".join(faults[:MOST_FAULTS]) + more)


def dump(config: Config) -> str:
    """The resolved configuration as YAML; `load` of this text gives an equal configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=120, allow_unicode=True)


def differences(old: Config, new: Config) -> dict[str, tuple]:
    """Dotted key -> (old, new) where two configurations differ; `resume`, `log`, `probe` and `run_dir` do not count."""
    a, b = (_flatten(c.model_dump(mode="json")) for c in (old, new))
    keys = (k for k in sorted(a.keys() | b.keys()) if k.split(".")[0] not in ("resume", "log", "probe", "run_dir"))
    return {k: (a.get(k), b.get(k)) for k in keys if a.get(k) != b.get(k)}


def _read(path: Path, seen: tuple[Path, ...]) -> dict:
    if path.resolve() in seen:
        raise UserError(f"{path}: its `base:` leads back to itself")
    try:
        tree = _Loader(path.read_text(encoding="utf-8")).get_single_data() or {}
    except OSError as error:
        raise UserError(f"cannot read configuration '{path}': {error.strerror}{_siblings(path)}") from None
    except (yaml.YAMLError, ValueError) as error:  # such as a date that no calendar has
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected `key: value` lines, found {type(tree).__name__}")
    base = tree.pop("base", None)
    if base is None:
        return tree
    return _merge(_read(path.parent / str(base), (*seen, path.resolve())), tree)


class _Loader(yaml.SafeLoader):
    """The safe loader, which would keep the last of two equal keys without a word."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _siblings(path: Path) -> str:
    names = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean '{path.parent / near[0]}'?" if near else ""


def _merge(base: Any, over: Any) -> Any:
    # Null empties a block; another method replaces the base's, whose settings would not fit it.
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    merged = dict(base)
    for key, value in over.items():
        replaces = key not in base or (key == "method" and _another_method(base[key], value))
        merged[key] = value if replaces else _merge(base[key], value)
    return merged


def _refuse_control_characters(value: Any, place: str = "") -> None:
    """Raise UserError for a key or a text, at any depth, that would break a line of a log or of a job script."""
    if isinstance(value, dict):
        for key, sub in value.items():
            _refuse_control_characters(str(key), f"a key{f' of {place}' if place else ''}")
            _refuse_control_characters(sub, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list):
        for i, sub in enumerate(value):
            _refuse_control_characters(sub, f"{place}.{i}")
    elif isinstance(value, str):
        try:
            plain_text(value)
        except ValueError as error:
            raise UserError(f"{place}: {error}") from None


def _another_method(base: Any, over: Any) -> bool:
    return isinstance(base, dict) and isinstance(over, dict) and "name" in over and over["name"] != base.get("name")


def _scalar(value: str, text: str) -> Any:
    try:
        return yaml.safe_load(value)
    except (yaml.YAMLError, ValueError):
        raise UserError(f"override '{text}': the value is not valid YAML; quote it") from None


def _set(tree: dict, keys: list[str], value: Any, text: str) -> None:
    for key in keys[:-1]:
        if tree.get(key) is None:
            tree[key] = {}
        tree = tree[key]
        if not isinstance(tree, dict):
            raise UserError(f"override '{text}': '{key}' holds a value, not settings")
    tree[keys[-1]] = value


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
