"""The kinds of value a setting takes, and what every section of a configuration shares."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer


def parse_fraction(value: Any) -> Fraction:
    """`2/255`, `0.0078` or a number as an exact Fraction; ValueError with the remedy otherwise."""
    try:
        return Fraction(str(value).replace(" ", ""))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"'{value}' is not a fraction; write it as 2/255 or 0.0078") from None


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"'{value}' is not a number")
    return value


def show_pixels(value: Fraction) -> str:
    """A radius or step as the field writes it: over 255 where that is exact (3/255, not 1/85)."""
    return f"{value * 255}/255" if value.denominator != 1 and (value * 255).denominator == 1 else str(value)


Pixels = Annotated[Fraction, BeforeValidator(parse_fraction), PlainSerializer(show_pixels, return_type=str)]
Ratio = Annotated[Fraction, BeforeValidator(parse_fraction), PlainSerializer(str, return_type=str)]
Int = Annotated[int, BeforeValidator(_no_bool)]
Number = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
