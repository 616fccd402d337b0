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
    return {
        "command": shlex.join(sys.argv),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cuda": torch.version.cuda,
        "versions": {name: _version(name) for name in PACKAGES},
        "git": _git(Path(__file__).parents[1]),
        "hosts": hosts,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(where: Path) -> dict | None:
    submission = where.parents[1] / "submission.json"
    if where.parent.name == "code" and submission.is_file():  # the copy that launch/submit.py made
        return json.loads(submission.read_text())["git"]

    def ask(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(where), *words], capture_output=True, text=True, check=True, timeout=20
        ).stdout

    try:
        return {
            "commit": ask("rev-parse", "HEAD").strip(),
            "changed": ask("status", "--porcelain", "--untracked-files=no").splitlines(),
        }
    except (OSError, subprocess.SubprocessError):
        return None  # installed without its history


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu x{torch.get_num_threads()}"
