"""What a run was made with: versions, git state, devices."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = (
    "mmtard",
    "torch",
    "torchvision",
    "deepspeed",
    "open_clip_torch",
    "webdataset",
    "submitit",
    "numpy",
    "pillow",
    "safetensors",
)


def environment(hosts: list[str]) -> dict:
    """The command, versions, git state and hosts of this process, as JSON keeps them."""
    return {
        "command": shlex.join(sys.argv),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cuda": torch.version.cuda,
        "versions": {name: _version(name) for name in PACKAGES},
        "git": _git(Path(__file__).parents[1]),
        "hosts": hosts,
    }


def device_name(device: torch.device) -> str:
    """The GPU by its name, or the CPU with the number of threads that torch uses."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu x{torch.get_num_threads()}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(package: Path) -> dict | None:
    """Commit and changed files of the checkout that holds the package; None without one."""
    submission = package.parents[1] / "submission.json"
    if package.parent.name == "code" and submission.is_file():  # the copy that a submission made
        try:
            return json.loads(submission.read_bytes())["git"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def ask(*words: str) -> str:
        command = ["git", "-C", str(package), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout

    try:
        changed = ask("status", "--porcelain", "--untracked-files=no").splitlines()
        return {"commit": ask("rev-parse", "HEAD").strip(), "changed": changed}
    except (OSError, subprocess.SubprocessError):
        return None  # installed without its history
