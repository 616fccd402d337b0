"""Every setting in words, and as a JSON schema for editors: both read from the schema itself."""

from __future__ import annotations

import difflib
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic_core import PydanticUndefined

from ..errors import UserError
from .attack import ATTACK_OBJECTIVES
from .methods import METHODS
from .models import Teacher
from .schema import Config
from .values import Section, show_pixels

ANY_TEACHER = "NAME"  # stands for a teacher's name in a key
_LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
_JSON_LIMITS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
_KINDS = {
    bool: "true | false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    Fraction: "a number or a fraction",
}
_EVERY_INT = 2**63 - 1


@dataclass(frozen=True)
class Setting:
    """One setting: its dotted key, the values it takes, its default as YAML (None: must be given), what it means."""

    key: str
    values: str
    default: str | None
    meaning: str
    method: str | None = None  # the method whose setting it is

    def __str__(self) -> str:
        of = f"   (method {self.method})" if self.method and self.key != "method.name" else ""
        default = "must be given" if self.default is None else f"default {self.default}"
        about = textwrap.fill(self.meaning, 76, initial_indent="    ", subsequent_indent="    ")
        return f"{self.key}{of}\n    {self.values}; {default}\n{about}"


def all_settings() -> list[Setting]:
    """Every setting, in the order of the configuration file."""
    return list(_settings_of(Config, ""))


def explain(key: str = "") -> str:
    """The settings of a key or of a section, in words; of all of them for ''. Raises UserError for an unknown key."""
    parts = key.split(".")
    if parts[0] == "teachers" and len(parts) > 1:
        parts[1] = ANY_TEACHER
    wanted = ".".join(parts)
    own = all_settings()
    found = [s for s in own if not key or s.key == wanted or s.key.startswith(f"{wanted}.")]
    if not found:
        keys = {s.key for s in own} | {s.key.rpartition(".")[0] for s in own if "." in s.key}
        near = [k for k in sorted(keys) if k.endswith(f".{key}")] or difflib.get_close_matches(
            wanted, sorted(keys), n=3
        )
        hint = f"did you mean {', '.join(near)}?" if near else "`mmtard config --explain` lists all of them"
        raise UserError(f"--explain: there is no setting '{key}'; {hint}")
    return "\n\n".join(map(str, found))


def json_schema() -> dict:
    """The JSON schema of a configuration file. Nothing is required there, since a `base:` may hold it."""
    schema = Config.model_json_schema()
    base = {"type": "string", "description": "another YAML file, whose settings hold where this one says nothing"}
    schema["properties"] = {"base": base, **schema["properties"]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mmtard configuration",
        **_for_editors(schema),
    }


def _for_editors(node: Any) -> Any:
    """Plain JSON schema: pydantic's names of limits translated, no titles, nothing required but a method's name."""
    if isinstance(node, list):
        return [_for_editors(item) for item in node]
    if not isinstance(node, dict):
        return node
    left_out = {"title"} | ({"required"} if node.get("required") != ["name"] else set())
    kept = {k: v for k, v in node.items() if k not in left_out or isinstance(v, dict)}
    if kept.get("le") == _EVERY_INT:
        del kept["le"]
    return {_JSON_LIMITS.get(k, k) if not isinstance(v, dict) else k: _for_editors(v) for k, v in kept.items()}


def _settings_of(section: type[Section], prefix: str, method: str | None = None) -> Iterator[Setting]:
    for name, field in section.model_fields.items():
        key, description = f"{prefix}{name}", field.description or ""
        inner = _section(field.annotation)
        if key == "method":
            yield _method_name()
            for name_of_method, settings in METHODS.items():
                yield from _settings_of(settings, "method.", name_of_method)
        elif key == "teachers":
            yield from _settings_of(Teacher, f"teachers.{ANY_TEACHER}.")
        elif inner is not None:
            if not field.is_required() and field.default is None:
                yield Setting(key, "a section, or null", "null", f"{description}. {inner.__doc__}")
            yield from _settings_of(inner, f"{key}.", method)
        elif key != "method.name":
            default = None if field.is_required() else _shown(field.default)
            yield Setting(key, _values(key, field), default, description, method)


def _method_name() -> Setting:
    lines = "; ".join(f"{name}: {settings.__doc__.splitlines()[0].rstrip('.')}" for name, settings in METHODS.items())
    return Setting("method.name", " | ".join(METHODS), None, f"the training objective. {lines}")


def _section(annotation: Any) -> type[Section] | None:
    """The section that a setting is, or may be."""
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, Section):
            return part
    return None


def _values(key: str, field: Any) -> str:
    """What a setting may be, with its limits: `a number, at least 0, below 1, or null`."""
    if key == "attack.objective":
        return f"{' | '.join(ATTACK_OBJECTIVES)}, or null"
    limits = [_limit(item) for item in field.metadata]
    return ", ".join([_kind(field.annotation), *filter(None, limits), *(["or null"] if _nullable(field) else [])])


def _limit(item: Any) -> str:
    parts = [_limit(inner) for inner in getattr(item, "metadata", [])]
    for name, word in _LIMITS.items():
        if getattr(item, name, None) not in (None, _EVERY_INT, 2**63):
            parts.append(f"{word} {getattr(item, name)}")
    return ", ".join(filter(None, parts))


def _nullable(field: Any) -> bool:
    return type(None) in get_args(field.annotation)


def _kind(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return ", ".join(filter(None, [_kind(args[0]), *(_limit(item) for item in args[1:])]))
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin in (Union, types.UnionType):
        return ", or ".join(dict.fromkeys(_kind(part) for part in args if part is not type(None)))
    if origin is list:
        return "a list of texts"
    if origin is tuple:
        return f"[{_kind(args[0])}; {_kind(args[1])}]"
    if origin is dict:
        return f"name -> {_kind(args[1])}"
    return _KINDS[annotation]


def _shown(default: Any) -> str:
    if isinstance(default, Fraction):
        return show_pixels(default)
    if default is PydanticUndefined:
        return "null"
    value = list(default) if isinstance(default, tuple) else default
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()
