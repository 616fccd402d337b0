"""The driver of this node's GPUs, and whether it is new enough for the CUDA that torch was built for."""

from __future__ import annotations

import re
from pathlib import Path

VERSION_FILE = Path("/proc/driver/nvidia/version")
# The first driver of each CUDA's line: it runs what is built for any of its minor versions (NVIDIA's CUDA Compatibility
# guide).
LEAST_DRIVER = {11: 450, 12: 525, 13: 580}


def driver_version() -> str | None:
    """The NVIDIA driver's version, such as 580.65.06; None where there is none."""
    try:
        told = VERSION_FILE.read_text()
    except OSError:
        return None
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", told)
    return found and found[0]


def why_too_old(cuda: str | None, driver: str | None) -> str | None:
    """Why a driver does not carry a torch that is built for this CUDA, and what to do; None where it may.

    A driver that is older may still do where the libraries of NVIDIA's forward compatibility are installed: ask only
    where torch sees no GPU.
    """
    least = LEAST_DRIVER.get(int(cuda.partition(".")[0])) if cuda else None
    if driver is None or least is None:
        return None
    own = int(driver.partition(".")[0])
    if own >= least:
        return None
    fitting = max((line for line, first in LEAST_DRIVER.items() if first <= own), default=None)
    wheels = f", or install PyTorch's wheels for CUDA {fitting} (the selector on pytorch.org)" if fitting else ""
    return f"the driver {driver} is older than {least}, which CUDA {cuda} needs; update it{wheels}"
