"""Commands that begin things: quickstart, configs, init, submit, completion."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import textwrap

from .. import resources
from ..config.argument_types import path
from ..errors import UserError
from .command import add_command, config_path


def add(commands) -> None:
    """Add the commands of this file to the command line."""
    _add_quickstart(commands)
    _add_configs(commands)
    _add_init(commands)
    _add_submit(commands)
    _add_completion(commands)


def _add_quickstart(commands) -> None:
    add_command(
        commands,
        "quickstart",
        _quickstart,
        "The main job in miniature on this machine: draws images, trains teachers and students, compares them.",
        "mmtard quickstart",
        more="Works in ./runs/quickstart and skips what is done. Some minutes on two cores; needs no data and no GPU.",
    )


def _quickstart(args) -> None:
    # Threads that wait by spinning slow each other down wherever something else runs on the same cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "mmtard.examples.quickstart"])


def _add_configs(commands) -> None:
    add_command(
        commands,
        "configs",
        _configs,
        "List the configurations that come with mmtard, each by its name and its first line.",
        "mmtard configs",
        more="A name stands for its file wherever a CONFIG is meant: mmtard train vitb32_mmtard run_dir=runs/b32",
    )


def _configs(args) -> None:
    own = resources.configurations()
    width = max(map(len, own))
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
    for name, file in own.items():
        line = f"{name:<{width}}  {resources.first_line(file)}"
        print(textwrap.fill(line, columns, subsequent_indent=" " * (width + 2)) if len(line) > columns else line)


def _add_init(commands) -> None:
    p = add_command(
        commands,
        "init",
        _init,
        "Write a configuration and a Slurm script of its own into a folder, for you to edit.",
        "mmtard init my_run\n         mmtard init my_run --config baselines/fare",
    )
    p.add_argument("folder", type=path, metavar="DIR", help="is made where it does not exist; no file is overwritten")
    p.add_argument(
        "--config",
        type=config_path,
        default="vitb32_mmtard",
        metavar="CONFIG",
        help="name or path of the configuration to begin with (default vitb32_mmtard)",
    )


def _init(args) -> None:
    from .project import SIZE, write_project

    written = write_project(args.folder, args.config)
    print(*written, sep="\n")
    config, script = (shlex.quote(str(path)) for path in (written[0], written[-1]))
    print(f"\n{script} asks for {SIZE}, whatever the configuration needs: its first lines say how to change that.")
    print(f"Edit that size, data.shards, run_dir and the account, then:\n  mmtard config {config}\n  sbatch {script}")


def _add_submit(commands) -> None:
    p = add_command(
        commands,
        "submit",
        _submit,
        "Submit to Slurm: a training, a sweep, or teachers, student and evaluation in their order; or run it here.",
        "mmtard submit --nodes 4 --partition gpu data.shards=/data/imagenet/train",
        add_help=False,  # --help is one of the words that are passed on
    )
    p.set_defaults(words=[])


def _submit(args) -> int:
    from ..launch.submit import main  # not before: what only measures needs no submitit

    return main(args.words, prog="mmtard submit")


def _add_completion(commands) -> None:
    p = add_command(
        commands,
        "completion",
        _completion,
        "Print what a shell needs to complete mmtard's commands and flags with the Tab key; needs `pip install shtab`.",
        "mmtard completion bash",
        more='In ~/.bashrc: eval "$(mmtard completion bash)". In ~/.zshrc: eval "$(mmtard completion zsh)"',
    )
    p.add_argument("shell", choices=("bash", "zsh", "tcsh"))


def _completion(args) -> None:
    from ..launch.arguments import parser as submit_parser

    try:
        import shtab
    except ModuleNotFoundError:
        raise UserError("completion needs the package shtab; install it: pip install shtab") from None
    top = args.program
    commands = next(action for action in top._actions if isinstance(action, argparse._SubParsersAction))
    commands.choices["submit"] = submit_parser("mmtard submit", "")
    print(shtab.complete(top, args.shell))
