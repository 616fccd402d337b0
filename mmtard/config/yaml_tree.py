"""Settings as YAML writes them: files with their `base:`, overrides, and one tree of plain values out of both."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from .values import plain_text, shorten

MOST_BYTES = 10 * 2**20
DEEPEST, LARGEST = 20, 100_000  # levels and values of a tree: more are no configuration, and would take for ever
MESSAGE = 300  # characters of a library's message


def read_tree(path: Path, seen: tuple[Path, ...] = ()) -> dict:
    """The tree of a YAML file over those of its `base:` files. Raises UserError for a file that cannot be used."""
    if path.resolve() in seen:
        raise UserError(f"{path}: its `base:` leads back to itself")
    try:
        tree = parse(_text(path))
    except OSError as error:
        raise UserError(f"cannot read configuration '{path}': {error.strerror}{_siblings(path)}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected `key: value` lines, found {type(tree).__name__}")
    check_tree(tree, str(path))
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise UserError(f"{path}: base: {shorten(base)} is no path; name one YAML file")
    return merge(read_tree(path.parent / base, (*seen, path.resolve())), tree)


def _text(path: Path) -> str:
    """The text of a file. Raises OSError, ValueError, and UserError for more than any configuration is long."""
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise UserError(f"cannot read configuration '{path}': it is longer than 10 MiB")
    return content.decode("utf-8")


def override(tree: dict, text: str) -> None:
    """Set one `key.sub=value` in a tree, in place. Raises UserError for what is none."""
    key, sep, value = text.partition("=")
    if not sep or not all(key.split(".")):
        raise UserError(f"override {shorten(text)} is not of the form key.sub=value")
    try:
        change = parse(value)
    except ValueError:
        raise UserError(f"override {shorten(text)}: the value is not valid YAML; quote it") from None
    check_tree({key: change}, f"override {shorten(text)}")
    keys = key.split(".")
    if key == "method.name" and _another_method(tree.get("method"), {"name": change}):
        keys, change = ["method"], {"name": change}
    _set(tree, keys, change, text)


def check_tree(tree: dict, source: str) -> None:
    """Raise UserError for what no setting holds.

    That is control characters, binary data, keys that are no words, and values in one another without an end.
    """
    room = LARGEST

    def check(value: Any, place: str, depth: int) -> None:
        """Raise UserError for what no configuration holds, at `place` and below it."""
        nonlocal room
        room -= 1
        if depth > DEEPEST:
            raise UserError(f"{source}: {place.partition('.')[0]} is nested too deeply to be a configuration")
        if room < 0:
            raise UserError(f"{source}: it holds more than {LARGEST:,} values, which no configuration does")
        if isinstance(value, dict):
            for key, sub in value.items():
                if not isinstance(key, str):
                    raise UserError(f"{place or source}: the key {shorten(key)} is no word; put it into quotes")
                check(key, f"a key{f' of {place}' if place else ''}", depth + 1)
                check(sub, f"{place}.{key}" if place else key, depth + 1)
        elif isinstance(value, list):
            for i, sub in enumerate(value):
                check(sub, f"{place}.{i}", depth + 1)
        elif isinstance(value, str):
            try:
                plain_text(value)
            except ValueError as error:
                raise UserError(f"{place}: {error}") from None
        elif isinstance(value, bytes):
            raise UserError(f"{place}: binary data is no setting; write it as text")

    check(tree, "", 0)


class _Loader(yaml.SafeLoader):
    """The safe loader, which would keep the last of two equal keys without a word, and merge (`<<`) without an end."""

    def __init__(self, text: str):
        super().__init__(text)
        self._looked_at: set[int] = set()

    def flatten_mapping(self, node):
        if id(node) not in self._looked_at:  # A second look would take what was merged in for the file's own keys.
            self._looked_at.add(id(node))
            _refuse_twins(node)
        super().flatten_mapping(node)
        if len(node.value) > LARGEST:
            raise yaml.constructor.ConstructorError(
                None, None, f"it has more than {LARGEST:,} keys, with those of its `<<`", node.start_mark
            )


def _refuse_twins(node: yaml.MappingNode) -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{key.value}' stands there twice", node.start_mark
                )
            seen.add(key.value)


def parse(text: str) -> Any:
    """The value of a YAML text; ValueError that says in one line why it has none."""
    try:
        return _Loader(text).get_single_data()
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:  # such as a date that no calendar has
        raise ValueError(shorten_text(str(error))) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def shorten_text(text: str) -> str:
    """A library's message on one line, and no longer than one reads."""
    line = " ".join(text.split())
    line = line if line.isprintable() else ascii(line)[1:-1]
    return line if len(line) <= MESSAGE else f"{line[:MESSAGE]}..."


def _siblings(path: Path) -> str:
    if os.path.lexists(path) or not path.parent.is_dir():  # its name is right, or there is no neighbour
        return ""
    names = [p.name for p in path.parent.glob("*.yaml")]
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean '{path.parent / near[0]}'?" if near else ""


def merge(base: Any, over: Any) -> Any:
    """`over` laid on `base`, section by section; neither is changed."""
    # Null empties a block; another method replaces the base's, whose settings would not fit it.
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    merged = dict(base)
    for key, value in over.items():
        replaces = key not in base or (key == "method" and _another_method(base[key], value))
        merged[key] = value if replaces else merge(base[key], value)
    return merged


def _another_method(base: Any, over: Any) -> bool:
    return isinstance(base, dict) and isinstance(over, dict) and "name" in over and over["name"] != base.get("name")


def _set(tree: dict, keys: list[str], value: Any, text: str) -> None:
    for key in keys[:-1]:
        if tree.get(key) is None:
            tree[key] = {}
        tree = tree[key]
        if not isinstance(tree, dict):
            raise UserError(f"override {shorten(text)}: '{key}' holds a value, not settings")
    tree[keys[-1]] = value
