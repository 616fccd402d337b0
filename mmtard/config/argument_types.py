"""Types of command-line arguments: each turns a word into a value, or says what to write instead."""

from __future__ import annotations

import argparse

from .. import config as settings


def positive(text: str) -> int:
    return at_least(text, 1)


def natural(text: str) -> int:
    return at_least(text, 0)


def positive_or(word: str):
    def parse(text: str) -> int | str:
        return text if text == word else positive(text)

    return parse


def jpeg_quality(text: str) -> int:
    if not 1 <= at_least(text, 1) <= 100:
        raise argparse.ArgumentTypeError(f"'{text}' is not a JPEG quality; give 1 to 100")
    return int(text)


def at_least(text: str, least: int) -> int:
    if not text.lstrip("-").isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least {least}")
    return int(text)


def fraction(text: str):
    try:
        value = settings.parse_fraction(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if value < 0:
        raise argparse.ArgumentTypeError(f"'{text}' is negative")
    return value
