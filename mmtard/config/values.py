"""The kinds of value a setting or an argument takes, and what every section of a configuration shares."""

from __future__ import annotations

import os
import re
import unicodedata
from fractions import Fraction
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema

# An exponent of more digits would make a number that fills the memory.
_DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,2})?", re.ASCII)
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})", re.ASCII)
# Control characters, line and paragraph separators, and bytes of a command line that are not UTF-8.
_UNPRINTABLE = ("Cc", "Zl", "Zp", "Cs")


def parse_fraction(value: Any) -> Fraction:
    """`2/255`, `0.5/255`, `0.0078` or a number as an exact Fraction; ValueError with the remedy otherwise."""
    parts = [part.strip() for part in str(value).split("/")]
    if 1 <= len(parts) <= 2 and all(len(part) <= 150 and _DECIMAL.fullmatch(part) for part in parts):
        numerator, denominator = Fraction(parts[0]), Fraction(parts[-1]) if len(parts) == 2 else Fraction(1)
        if denominator != 0:
            return numerator / denominator
    raise ValueError(f"{shorten(value)} is not a fraction; write it as 2/255 or 0.0078")


def show_pixels(value: Fraction) -> str:
    """A radius or step as the field writes it: over 255 where that is exact (3/255, not 1/85)."""
    return f"{value * 255}/255" if value.denominator != 1 and (value * 255).denominator == 1 else str(value)


def check_unit(key: str, value: Fraction) -> None:
    """Raise ValueError for an L-inf radius or step that is meant in levels of 255."""
    if value >= 1:
        raise ValueError(
            f"{key}: {value} is in units of [0,1], the whole range of a pixel; "
            f"write {value}/255 for {value} of 255 levels"
        )


def plain_text(text: str) -> str:
    """The text itself; ValueError where a character of it would break a line, a terminal or a file's encoding.

    Settings and arguments reach job scripts, logs and tables, where a line break would begin a line of its own.
    """
    for character in text:
        if unicodedata.category(character) in _UNPRINTABLE:
            raise ValueError(f"{shorten(text)} holds the control character {ascii(character)}; take it out")
    return text


def expand_path(text: str) -> str:
    """A path with `~`, `~user`, `$NAME` and `${NAME}` filled in. An opener (`pipe:`, `s3://`) stays as it is.

    Variables that are not set stay too, since a file may be named so; ValueError where the path begins with one.
    """
    if text.startswith(("pipe:", "file:")) or "://" in text:
        return text
    first = _VARIABLE.match(text)
    if first and (first[1] or first[2]) not in os.environ:
        name = first[1] or first[2]
        raise ValueError(f"{shorten(text)}: the environment has no variable {name}; set it, or write the whole path")
    filled = _VARIABLE.sub(lambda found: os.environ.get(found[1] or found[2], found[0]), text)
    return plain_text(os.path.expanduser(filled))


def shorten(value: Any) -> str:
    """A value as a message shows it: quoted, on one line, and no longer than one reads."""
    text = str(value)
    shown = repr(text) if text.isprintable() else ascii(text)
    return shown if len(shown) <= 200 else f"{shown[:190]}..."


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"'{value}' is not a number")
    return value


_FRACTION_SCHEMA = WithJsonSchema({"type": ["number", "string"]})
Pixels = Annotated[
    Fraction, BeforeValidator(parse_fraction), PlainSerializer(show_pixels, return_type=str), _FRACTION_SCHEMA
]
Ratio = Annotated[Fraction, BeforeValidator(parse_fraction), PlainSerializer(str, return_type=str), _FRACTION_SCHEMA]
Int = Annotated[int, BeforeValidator(_no_bool), Field(le=2**63 - 1)]
Number = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
PathText = Annotated[
    str, Field(min_length=1), AfterValidator(expand_path)
]  # a path, or a name of another kind, which holds no ~ or $


class Section(BaseModel):
    """A section of a configuration: its keys are known, its values checked, and it does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
