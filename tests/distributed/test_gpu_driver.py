"""The GPU's driver is read where the kernel says it, and judged by the CUDA that torch was built for."""

import pytest

from mmtard.distributed import gpu_driver
from mmtard.distributed.gpu_driver import driver_version, why_too_old

CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version: 12.2.0"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder@U22-I3)\n"


@pytest.mark.parametrize("told, version", [(CLOSED, "535.104.05"), (OPEN, "580.65.06"), ("a novelty", None)])
def test_the_kernel_modules_version_is_read(tmp_path, monkeypatch, told, version):
    (tmp_path / "version").write_text(told)
    monkeypatch.setattr(gpu_driver, "VERSION_FILE", tmp_path / "version")
    assert driver_version() == version


def test_a_machine_without_a_driver_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_driver, "VERSION_FILE", tmp_path / "gone")
    assert driver_version() is None


@pytest.mark.parametrize(
    "cuda, driver, words",
    [
        (
            "13.0",
            "535.104.05",
            "older than 580, which CUDA 13.0 needs; update it, or install PyTorch's wheels for CUDA 12",
        ),
        (
            "12.8",
            "470.82.01",
            "older than 525, which CUDA 12.8 needs; update it, or install PyTorch's wheels for CUDA 11",
        ),
        ("13.0", "390.25", "older than 580, which CUDA 13.0 needs; update it"),
        ("13.0", "580.65.06", None),
        ("12.8", "535.104.05", None),
        ("14.0", "535.104.05", None),  # a line that is not known yet
        (None, "535.104.05", None),
        ("13.0", None, None),
    ],
)
def test_a_driver_older_than_torchs_cuda_needs_is_told_with_both_ways_out(cuda, driver, words):
    told = why_too_old(cuda, driver)
    assert told is None if words is None else told.startswith(f"the driver {driver} is {words}")
