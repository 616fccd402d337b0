"""The program: `mmtard ...` and `python -m mmtard ...`."""

from .cli.main import main
from .distributed.processes import exit_process


def run() -> None:
    """Carry out this process's command line and end it."""
    exit_process(main())


if __name__ == "__main__":
    run()
