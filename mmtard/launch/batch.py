"""The body of a job of slurm/*.sh: start the ranks, keep their log, and start the job again while work is left.

    exec python -m mmtard.launch.batch --script "$0" train [CONFIG...] -- "$@"

Before `--` stands the command of mmtard, and for an array of trainings one configuration a task; after it stand the
arguments of the script. Three variables fit it to a cluster: MMTARD_PYTHON, the Python of the ranks (default: python);
MMTARD_SRUN, words that follow srun's own flags, such as `apptainer exec --nv mmtard.sif` or `--container-image=...`;
MMTARD_SETUP, a file that the scripts source before Python starts. Where MMTARD_SRUN is set, the standard library is
enough for this program: whatever needs more runs where the ranks run.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

from .. import resources
from ..distributed import slurm
from ..distributed.interruption import EXIT_INTERRUPTED
from ..errors import UserError
from .environment import announcement, rendezvous, say
from .request import DEFAULT_CONFIG, words_of
from .requeue import MAX_REQUEUES, CannotGoOnError, from_outside, go_on, ignore_signals, may_start, wants_more
from .resubmit import submit_script_again

# How the log calls the work of a command.
WORK = {"train": "training", "cache": "storing", "evaluate": "evaluation", "preflight": "checking"}


def main(argv: list[str] | None = None) -> int:
    """Run the body of a job; the exit status of the ranks, of a signal as 128 + its number. 2: the user's to mend."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as a shell would end
    try:
        return _run(*_parse(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(f"mmtard: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2


def _parse(argv: list[str]) -> tuple[str, str, list[str], list[str]]:
    """(script, command of mmtard, configurations of an array's tasks, arguments of the script)."""
    own, arguments = argv, []
    if "--" in argv:
        cut = argv.index("--")
        own, arguments = argv[:cut], argv[cut + 1 :]
    parser = argparse.ArgumentParser(prog="python -m mmtard.launch.batch", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--script", required=True, help="the script of this job, to be submitted again")
    parser.add_argument("command", choices=tuple(WORK))
    parser.add_argument("configs", nargs="*", metavar="CONFIG", help="one for each task of a job array")
    args = parser.parse_args(own)
    return args.script, args.command, args.configs, arguments


def _run(script: str, command: str, configs: list[str], arguments: list[str]) -> int:
    setup = os.environ.get("MMTARD_SETUP")
    if setup and not Path(setup).is_file():
        raise UserError(f"MMTARD_SETUP: '{setup}' is no file on {os.uname().nodename}; give its whole path")
    os.environ.update(rendezvous(os.environ))
    words = _evaluation(arguments) if command == "evaluate" else _configured(configs, arguments)
    say(announcement(os.environ, f", {' '.join(words)}"))
    if command == "train" and (refused := may_start("now", words, _one_rank())):
        return refused
    commands = [command]
    if command == "train" and (missing := _not_stored(words)):
        say(f"stores the embeddings of {', '.join(missing)} first, once for every training on them")
        commands = ["cache", "train"]
    for command in commands:
        status, said = _ranks((command, *words))
        if status:
            break
    if command == "preflight":
        return status
    say(f"{WORK[command]} ended with status {status}")
    if wants_more(status) and _may_go_on(command, words, status, said):
        training = words if command == "train" else ()
        try:
            go_on(slurm.job(), lambda: submit_script_again(script, arguments), training=training)
        except CannotGoOnError as error:
            say(str(error))
    return status


def _may_go_on(command: str, words: tuple[str, ...], status: int, said: str) -> bool:
    """Whether the work may be started again by itself: a training knows from its run who stopped it."""
    if command != "train":
        return status != EXIT_INTERRUPTED and slurm.starts() <= MAX_REQUEUES
    return may_start("signalled" if from_outside(status, said) else "again", words, _one_rank()) == 0


def _srun(*flags: str) -> list[str]:
    """srun of the ranks' Python."""
    return ["srun", *flags, *words_of(os.environ.get("MMTARD_SRUN", ""), "MMTARD_SRUN"), _python()]


def _python() -> str:
    return os.environ.get("MMTARD_PYTHON") or "python"


def _one_rank() -> list[str]:
    """The Python of what one rank does for all: in the ranks' container, where there is one."""
    return _srun("--nodes=1", "--ntasks=1") if os.environ.get("MMTARD_SRUN") else [_python()]


def _not_stored(words: tuple[str, ...]) -> list[str]:
    """The teachers that are set to be stored and are not yet; none where that cannot be asked: training says why."""
    command = [*_one_rank(), "-m", "mmtard", "config", "--not-stored", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, preexec_fn=ignore_signals)
    return done.stdout.split() if done.returncode == 0 else []


def _ranks(words: tuple[str, ...]) -> tuple[int, str]:
    """`mmtard WORDS` on every rank; srun's exit status, of a signal as 128 + its number, and with one what was printed.

    What the ranks print goes to the job's log, which keeps every start, and to a file of this start.
    """
    own = _own_log()
    before = own.stat().st_size if own.is_file() else 0  # of another job with the same log
    # Slurm's signals, which the ranks heed, would end tee before the ranks' last lines.
    tee = subprocess.Popen(["tee", "-a", own], stdin=subprocess.PIPE, preexec_fn=ignore_signals)
    # A rank that is killed leaves the others waiting for it in a collective: end them, too.
    flags = ("--kill-on-bad-exit=1", "--label")
    try:
        command = [*_srun(*flags), "-m", "mmtard", *words]
        ranks = subprocess.Popen(command, stdout=tee.stdin, stderr=subprocess.STDOUT)
    except OSError as error:
        raise UserError(f"srun: {error.strerror}; the ranks of a job are started by Slurm's srun") from None
    finally:
        tee.stdin.close()
    status = ranks.wait()
    tee.wait()
    status = status if status >= 0 else 128 - status
    return status, _printed(own, before) if status > 128 else ""


def _own_log() -> Path:
    """The file of what the ranks of this start print; a sink where the controller is too busy to name the log."""
    log = slurm.job_fields(slurm.job()).get("StdOut")
    return Path(f"{log.removesuffix('.log')}-start{slurm.starts()}.log" if log else os.devnull)


def _printed(log: Path, after: int) -> str:
    try:
        with open(log, "rb") as file:
            file.seek(after)
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _evaluation(arguments: list[str]) -> tuple[str, ...]:
    """The arguments of `mmtard evaluate` for this task of the array, of `MODEL DATASET... [-- FLAGS...]`."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    (model, *datasets), flags = arguments[:cut] or [""], arguments[cut + 1 :]
    if not model:
        raise UserError("the first argument is the model, such as runs/b32")
    task = int(os.environ.get("SLURM_ARRAY_TASK_ID") or 0)
    if task >= len(datasets):
        raise UserError(f"no dataset for task {task} of the array; give as many datasets as the array has tasks")
    _look_for_datasets_without_task(datasets, task)
    return (model, "--data", datasets[task], *flags)


def _look_for_datasets_without_task(datasets: list[str], task: int) -> None:
    """Raise UserError where one task alone, as without --array, would leave datasets out; say what a larger array does.

    A part of an array that a person submits anew (`--array=3`) is as much as was asked for, and so is task 0 of an
    array that goes on as a job of its own. A person submits task 0 anew by naming its dataset alone: `--array=0` cannot
    be told from the script's own.
    """
    last = int(os.environ.get("SLURM_ARRAY_TASK_MAX") or task)
    if last == 0 and len(datasets) > 1 and slurm.starts() == 1:
        raise UserError(
            f"{len(datasets)} datasets, 1 task: submit with --array=0-{len(datasets) - 1}, or give one dataset"
        )
    if 0 < last < len(datasets) - 1 and slurm.starts() == 1:
        left = ", ".join(datasets[last + 1 :])
        say(f"no task of this array measures {left}; --array=0-{len(datasets) - 1} has one for each dataset")


def _configured(configs: list[str], arguments: list[str]) -> tuple[str, ...]:
    """The configuration and its overrides: this task's, or the first argument, or MMTARD_CONFIG, or the ViT-B/32's."""
    if configs:
        task = int(os.environ.get("SLURM_ARRAY_TASK_ID") or 0)
        if task >= len(configs):
            raise UserError(f"no configuration for task {task} of the array; ask for --array=0-{len(configs) - 1}")
        return (str(resources.find_config(configs[task])), *arguments)
    if arguments and "=" not in arguments[0]:
        return tuple(arguments)
    return (os.environ.get("MMTARD_CONFIG") or str(resources.find_config(DEFAULT_CONFIG)), *arguments)


if __name__ == "__main__":
    raise SystemExit(main())
