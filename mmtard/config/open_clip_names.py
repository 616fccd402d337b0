"""Architectures and weight tags of the installed open_clip, read from its files: importing it would import torch."""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path


@cache
def architectures() -> frozenset[str]:
    """The names of open_clip's architectures; empty where open_clip is not installed."""
    folder = _folder()
    return frozenset(path.stem for path in (folder / "model_configs").glob("*.json")) if folder else frozenset()


@cache
def weight_tags() -> dict[str, frozenset[str]]:
    """Architecture -> the tags of its pretrained weights; {} where open_clip is not installed or lists them otherwise.

    open_clip lists them as `_PRETRAINED = {"RN50": _RN50, ...}`, `_RN50 = dict(openai=...)`, or the same with {}.
    """
    folder = _folder()
    try:
        tree = ast.parse((folder / "pretrained.py").read_text(encoding="utf-8")) if folder else ast.Module([], [])
    except (OSError, ValueError, SyntaxError):
        return {}
    values = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    listed = values.get("_PRETRAINED")
    if not isinstance(listed, ast.Dict):
        return {}
    tags: dict[str, frozenset[str]] = {}
    for key, value in zip(listed.keys, listed.values):
        of = _settings(values.get(value.id) if isinstance(value, ast.Name) else value)
        if isinstance(key, ast.Constant) and of:
            tags[key.value] = frozenset(of)
            quick = frozenset(tag for tag, settings in of.items() if _is_true(_settings(settings).get("quick_gelu")))
            if quick:  # open_clip lists these under a second name, too
                tags[f"{key.value}-quickgelu"] = quick
    return tags


def _settings(node: ast.expr | None) -> dict[str, ast.expr]:
    """Name -> value of `f(name=value, ...)` or `{"name": value, ...}`."""
    if isinstance(node, ast.Call):
        return {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
    if isinstance(node, ast.Dict):
        return {key.value: value for key, value in zip(node.keys, node.values) if isinstance(key, ast.Constant)}
    return {}


def _is_true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def _folder() -> Path | None:
    try:
        spec = importlib.util.find_spec("open_clip")
    except (ImportError, ValueError):
        return None
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None
