"""The program: `mmtard ...` and `python -m mmtard ...`."""

from .cli.main import main
from .distributed.console import outlive_reader
from .distributed.processes import exit_process


def run() -> None:
    """Carry out this process's command line and end it."""
    outlive_reader()
    exit_process(main())


if __name__ == "__main__":
    run()
