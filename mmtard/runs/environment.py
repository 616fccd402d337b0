"""What a run was made with: versions, git state, devices."""

from __future__ import annotations

import platform
import shlex
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

from ..resources import git_state

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
        "versions": {name: installed_version(name) for name in PACKAGES},
        "git": git_state(),
        "hosts": hosts,
    }


def device_name(device: torch.device) -> str:
    """The GPU by its name, or the CPU with the number of threads that torch uses."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu x{torch.get_num_threads()}"


@cache
def installed_version(package: str) -> str | None:
    """The version of a package; None where it is not installed, as for mmtard itself run from a checkout."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
