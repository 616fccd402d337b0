"""What every command is made with: its parser, the arguments of a configuration, and quick heavy imports."""

from __future__ import annotations

import argparse
import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .. import resources
from ..config import Config
from ..config.argument_types import path
from ..errors import RunError, UserError
from ..runs import history


def add_command(
    commands, name: str, run: Callable, help: str, example: str, more: str = "", **parser_settings
) -> argparse.ArgumentParser:
    """The parser of a new command; `run(args)` carries the command out and returns its exit status, None for 0.

    help: one line, in the list of commands and above the command's own help. more: goes on there.
    """
    parser = commands.add_parser(
        name,
        help=help,
        description="\n".join(filter(None, [help, more])),
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **parser_settings,
    )
    parser.set_defaults(run=run)
    return parser


def add_config_arguments(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    """The arguments of a command that reads a configuration."""
    parser.add_argument(
        "config",
        type=config_path,
        nargs="?" if optional else None,
        metavar="CONFIG",
        help="YAML file, or the name of one that comes with mmtard, such as vitb32_mmtard; `mmtard configs` lists them",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],  # else argparse calls them required
        metavar="key=value",
        help="settings over those of the file, e.g. train.lr=1e-5",
    )


def config_path(text: str) -> Path:
    """The type of an argument that names a configuration: a path, or a name of mmtard's own."""
    try:
        return resources.find_config(path(text))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def name_flags(message: str, flags: dict[str, str]) -> str:
    """A message of a package that knows settings alone, with the flags of the command line that set them.

    flags: what the message may say -> what the user writes.
    """
    if not flags:
        return message
    words = "|".join(re.escape(word) for word in sorted(flags, key=len, reverse=True))
    return re.sub(rf"(?<![\w.-])({words})(?![\w.])", lambda found: flags[found[1]], message)


def may_start(config: Config, when: str = "now") -> None:
    """Raise RunError where the `resume` settings do not let the run be started; "now", "again" or "signalled"."""
    run, bounds = Path(config.run_dir), config.resume
    reason = history.why_not_restart(run, bounds)
    if not reason and when == "again":
        reason = history.why_not_restart_job(run)
    if not reason and when == "signalled":
        reason = history.why_not_restart_signalled(run, bounds.max_starts_without_progress)
    if reason:
        raise RunError(f"'{config.run_dir}': {reason}")


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
