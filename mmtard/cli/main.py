"""`mmtard`: the command line as a whole, and the exit status of each way a command can end.

Heavy imports wait inside the commands until the arguments are known to be good.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from typing import NoReturn

from ..config.argument_types import check_words
from ..distributed.console import say
from ..errors import RunError, UserError, unknown_name
from ..resources import VERSION
from . import benchmarks, config, data, evaluation, launch, runs, study, training
from .command import name_flags

PROGRAM = "mmtard"
GROUPS = (launch, data, config, training, runs, evaluation, study, benchmarks)  # as --help lists them


# Package -> what needs it, where an installation may do without: those that only measure, attack, export or report.
OPTIONAL = {
    "deepspeed": "training",
    "webdataset": "reading and writing shards",
    "submitit": "submitting to Slurm",
    "matplotlib": "the figures of a report",
    "tensorboard": "TensorBoard's event files",
    "peft": "adapters (student.lora, export without --merge-lora)",
    "wandb": "Weights & Biases",
}


def main(argv: list[str] | None = None) -> int:
    """Run a command line; the exit status. Without any words it shows what there is.

    0 done, 1 the run failed, 2 the user's to mend, 75 start it again to go on, 130 interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        print(parser().format_help(), end="", file=sys.stderr)
        return 2
    args = argparse.Namespace()
    try:
        check_words(argv)
        args = parse(argv)
        return args.run(args) or 0
    except UserError as error:
        return _fail(name_flags(str(error), getattr(args, "flags", {})), 2)
    except RunError as error:
        return _fail(str(error), error.status)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise
        reason = " ".join(str(error).split())[:200] or "MemoryError"
        return _fail(f"this machine has too little memory for what was asked ({reason}); ask for less", 1)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return _fail(f"the name '{str(error.filename)[:60]}...' is too long for a file system; shorten it", 2)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in OPTIONAL:
            raise
        return _fail(
            f"the package {package} is not here, for {OPTIONAL[package]}; install it: pip install {package}", 2
        )


class Parser(argparse.ArgumentParser):
    """A parser, and those of its commands, that says in one line what does not fit, without all that would."""

    def error(self, message: str) -> NoReturn:
        """End the process with status 2."""
        say(f"{self.prog}: {' '.join(message.split())}; see `{self.prog} --help`", sys.stderr)
        raise SystemExit(2)


def parser() -> argparse.ArgumentParser:
    """The whole command line: every command with its arguments and an example."""
    top = Parser(
        prog=PROGRAM,
        description="Train and measure vision-language models that resist adversarial images.",
        epilog="`mmtard COMMAND --help` has a command's arguments and an example. `mmtard quickstart` is a first try.",
    )
    top.add_argument("--version", action="version", version=f"{PROGRAM} {VERSION}")
    # The deepspeed launcher puts this before the arguments of every command it starts; the environment says the rank.
    top.add_argument("--local_rank", help=argparse.SUPPRESS)
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for group in GROUPS:
        group.add(commands)
    top.set_defaults(program=top)  # for the command that prints what a shell completes
    return top


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments of a command line; ends the process with status 2 where they do not fit.

    Raises UserError for an unknown command.
    """
    top = parser()
    names = next(action.choices for action in top._actions if action.choices)
    if not argv[0].startswith("-") and argv[0] not in names:
        raise unknown_name("command", argv[0], names)
    args, left = top.parse_known_args(argv)
    if hasattr(args, "words"):  # a command with a parser of its own takes them as they are
        args.words = left
        return args
    # argparse takes all settings at once, before the first flag; settings that follow a flag are left over.
    if left and not (hasattr(args, "overrides") and all("=" in word and not word.startswith("-") for word in left)):
        top.error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        args.overrides += left
    return args


def _fail(message: str, status: int) -> int:
    rank = os.environ.get("RANK", "0")
    name = PROGRAM if rank == "0" else f"{PROGRAM} (rank {rank})"
    say(f"{name}: {' '.join(message.split())}", sys.stderr)
    return status
