"""What every command is made with: its parser, the arguments of a configuration, and quick heavy imports."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..config.argument_types import path


def add_command(commands, name: str, run: Callable, help: str, example: str) -> argparse.ArgumentParser:
    """The parser of a new command; `run(args)` carries the command out and returns its exit status, None for 0."""
    parser = commands.add_parser(
        name,
        help=help,
        description=help,
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of a command that reads a configuration."""
    parser.add_argument("config", type=path, metavar="CONFIG", help="YAML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings over those of the file, e.g. train.lr=1e-5"
    )


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Turn the garbage collector off during heavy imports.

    Scanning the new, permanent objects over and over costs a third of the import time.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
