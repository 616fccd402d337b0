"""This installation: its version, and the configurations and Slurm scripts that came with it, by name."""

from __future__ import annotations

import difflib
import json
import subprocess
from pathlib import Path

from .errors import UserError

VERSION = "0.1.0"
PACKAGE = Path(__file__).resolve().parent
STUDIES = "studies"  # the folder of configs/ whose files are studies, no runs
SHARED = "base.yaml"  # what other configurations of its folder build on, no run of its own


def folder(name: str) -> Path:
    """The folder `configs` or `slurm` of this installation. Raises UserError where it was not installed.

    By path and not through importlib: an editable install cannot import `mmtard._files`.
    """
    for path in (PACKAGE / "_files" / name, PACKAGE.parent / name):
        if path.is_dir():
            return path
    raise UserError(f"this installation of mmtard has no {name}/ folder; install its wheel, or work in a checkout")


def configurations() -> dict[str, Path]:
    """Name -> file of every run that mmtard brings a configuration for: `vitb32_mmtard`, `baselines/fare`."""
    root = folder("configs")
    paths = sorted(root.rglob("*.yaml"), key=lambda path: (len(path.relative_to(root).parts), path))
    return {str(path.relative_to(root).with_suffix("")): path for path in paths if _is_run(path)}


def studies() -> dict[str, Path]:
    """Name -> file of every study that mmtard brings: `shapes`, `cifar`."""
    return {path.stem: path for path in sorted((folder("configs") / STUDIES).glob("*.yaml"))}


def _is_run(path: Path) -> bool:
    return path.name != SHARED and path.parent.name != STUDIES


def find_config(text: str | Path) -> Path:
    """The file that a path or the name of one of mmtard's own configurations means.

    A file or a path of its own comes first; `configs/NAME.yaml` means mmtard's own where there is no such file here.
    Raises UserError for an unknown name; a path that does not exist is returned as it is, for its reader to name.
    """
    path, name = Path(text), str(text)
    if path.is_file() or path.is_absolute():
        return path
    own = configurations()
    known = own.get(name.removeprefix("configs/").removesuffix(".yaml"))
    if known:
        return known
    matches = [full for full in own if full.rpartition("/")[2] == name]
    if len(matches) == 1:
        return own[matches[0]]
    if matches:
        raise UserError(f"several configurations are called '{name}'; write one of {', '.join(matches)}")
    if "/" in name or path.suffix or path.exists():
        return path
    begun = [full for full in own if full.startswith(name)]
    near = begun or difflib.get_close_matches(name, [*own, *(full.rpartition("/")[2] for full in own)], n=3)
    hint = f"did you mean {', '.join(dict.fromkeys(near))}?" if near else "write a name or the path of a YAML file;"
    raise UserError(f"unknown configuration '{name}'; {hint} `mmtard configs` lists those that come with mmtard")


def first_line(config: Path) -> str:
    """What a configuration says of itself in its first line."""
    with config.open(encoding="utf-8") as file:
        return file.readline().strip().removeprefix("#").strip()


def git_state() -> dict | None:
    """Commit and changed files of the checkout that mmtard runs from, {"commit", "changed"}; None outside one.

    The copy that a submission made answers with the state of what it was copied from.
    """
    checkout = PACKAGE.parent
    submission = checkout.parent / "submission.json"
    if checkout.name == "code" and submission.is_file():
        try:
            return json.loads(submission.read_bytes())["git"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
    if not (checkout / ".git").exists():  # an installed package may lie inside the repository of something else
        return None

    def ask(*words: str) -> str:
        command = ["git", "-C", str(checkout), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout

    try:
        changed = ask("status", "--porcelain", "--untracked-files=no").splitlines()
        return {"commit": ask("rev-parse", "HEAD").strip(), "changed": changed}
    except (OSError, subprocess.SubprocessError):
        return None
