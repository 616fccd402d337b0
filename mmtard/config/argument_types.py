"""Types of command-line arguments: each turns a word into a value, or says what to write instead."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

from ..errors import UserError
from .values import expand_path, parse_fraction, plain_text


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return at_least(text, 1)


def natural(text: str) -> int:
    """A whole number of at least 0."""
    return at_least(text, 0)


def positive_or(word: str) -> Callable[[str], int | str]:
    """The type of an argument that is one `word` or a whole number of at least 1."""

    def parse(text: str) -> int | str:
        return text if text == word else positive(text)

    return parse


def separated(of: Callable[[str], int]) -> Callable[[str], list[int]]:
    """The type of an argument that is several numbers with commas between them."""

    def parse(text: str) -> list[int]:
        return [of(part) for part in text.split(",")]

    return parse


def jpeg_quality(text: str) -> int:
    """A whole number from 1 to 100."""
    if not 1 <= at_least(text, 1) <= 100:
        raise argparse.ArgumentTypeError(f"'{text}' is not a JPEG quality; give 1 to 100")
    return int(text)


def at_least(text: str, least: int) -> int:
    """A whole number of at least `least`, of at most 18 digits."""
    digits = text.removeprefix("-")
    if not (digits.isdigit() and digits.isascii() and len(digits) <= 18) or int(text) < least:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least {least}")
    return int(text)


def fraction(text: str) -> Fraction:
    """A radius in units of [0, 1], such as 2/255."""
    try:
        value = parse_fraction(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if value < 0:
        raise argparse.ArgumentTypeError(f"'{text}' is negative")
    return value


def path_text(text: str) -> str:
    """A path, or another source such as an opener or a tag, with `~` and `$NAME` filled in."""
    try:
        return expand_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def path(text: str) -> Path:
    """A path with `~` and `$NAME` filled in."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty; write one")
    return Path(path_text(text))


def check_words(words: list[str]) -> None:
    """Raise UserError for a word of a command line that holds a control character."""
    for word in words:
        try:
            plain_text(word)
        except ValueError as error:
            raise UserError(f"the argument {error}") from None
