"""What a Python call asks of an evaluation, in the terms of its protocols. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from fractions import Fraction
from numbers import Real
from typing import Any

from ..config import parse_fraction
from ..errors import UserError, unknown_name
from . import request
from .protocols import Protocol

# These are arguments of their own, or what a protocol is published with.
_NOT_CHANGES = {"name", "eps", "norm", "n_samples", "eps_of", "datasets", "purpose"}


def pixels(value: object, name: str) -> Fraction:
    """A radius or step in units of [0,1]. Raises UserError for what is no number."""
    if isinstance(value, bool) or not isinstance(value, str | Real):
        raise UserError(f"{name}: {value!r} is not a number; write it as '2/255' or 0.0078")
    try:
        return parse_fraction(value)
    except (ValueError, OverflowError) as error:
        raise UserError(f"{name}: {error}") from None


# What stands in quotes is the user's own.
_FLAG = re.compile(r"(?<!\w)'[^']*'|--([a-z][a-z-]*)")
_SETTING = re.compile(r"^(source|model|transfer_from)(?:\.text)*\.(weights|arch|text|quick_gelu|ema)(?=:)")
_DATA = re.compile(r"^(?:data|engine)\.(shards|index|classnames|templates|device)(?=:)")
_EXAMPLE = re.compile(r"e\.g\. (arch|text): ([\w./-]+)")


@contextmanager
def arguments_named() -> Iterator[None]:
    """Errors name the arguments of the Python function where they would name flags of a command or settings of YAML."""
    try:
        yield
    except UserError as error:
        raise UserError(in_arguments(str(error))) from None


def in_arguments(message: str) -> str:
    """A message in the words of Python: n_samples for --n-samples, arch for source.arch, arch="X" for arch: X."""
    text = _FLAG.sub(lambda word: word[1].replace("-", "_") if word[1] else word[0], message)
    arch = "transfer_arch" if text.startswith("transfer_from.") else "arch"

    def argument(setting: re.Match) -> str:
        model, key = setting.groups()
        if key == "weights":
            return model
        if key == "arch":
            return arch
        return key if model == "source" else f"{model} ({key} of mmtard.load)"

    text = _SETTING.sub(argument, text)
    text = _DATA.sub(lambda setting: "data" if setting[1] == "shards" else setting[1], text)
    return _EXAMPLE.sub(lambda example: f'e.g. {arch if example[1] == "arch" else "text"}="{example[2]}"', text)


def changed_protocol(
    name: str, eps: Any, norm: Any, n_samples: int | str | None, transfer: bool, changes: dict[str, Any]
) -> Protocol:
    """The protocol with what the call changes. Raises UserError for a setting that no protocol has."""
    from ..attacks.threat_model import check_norm

    own = {field.name for field in fields(Protocol)} - _NOT_CHANGES
    for key in changes:
        if key not in own:
            raise unknown_name("setting of an evaluation", key, own)
    for key in ("attacks", "templates"):
        if changes.get(key) is not None:
            given = changes[key]
            changes[key] = (given,) if isinstance(given, str) else tuple(given)
    if changes.get("step_size") is not None:
        changes["step_size"] = pixels(changes["step_size"], "step_size")
    if eps is not None:
        eps = [pixels(radius, "eps") for radius in ([eps] if isinstance(eps, str | Real) else eps)]
    if isinstance(n_samples, str) and n_samples != "all":
        raise UserError(f"n_samples: '{n_samples}' is no number; write one, or 'all'")
    return request.protocol(
        name,
        eps,
        transfer,
        all_samples=n_samples == "all",
        n_samples=None if n_samples == "all" else n_samples,
        norm=None if norm is None else check_norm(norm),
        **changes,
    )
