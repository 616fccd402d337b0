"""The program: `mmtard ...` and `python -m mmtard ...`."""

from .cli import main
from .lifetime import leave


def run() -> None:
    """Carry out this process's command line and end it."""
    leave(main())


if __name__ == "__main__":
    run()
