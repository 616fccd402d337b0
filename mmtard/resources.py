"""Where the configurations and the Slurm scripts are: in the wheel, or in the checkout."""

from __future__ import annotations

from pathlib import Path

from .errors import UserError

PACKAGE = Path(__file__).resolve().parent


def folder(name: str) -> Path:
    """The folder `configs` or `slurm` of this installation. Raises UserError where it was not installed.

    By path and not through importlib: an editable install cannot import `mmtard._files`.
    """
    for path in (PACKAGE / "_files" / name, PACKAGE.parent / name):
        if path.is_dir():
            return path
    raise UserError(f"this installation of mmtard has no {name}/ folder; install its wheel, or work in a checkout")
