"""A precision that the device has no instructions for is said to be slow."""

import pytest
import torch

from mmtard.training.setup import slow_precision


@pytest.mark.parametrize(
    "precision, device, avx512_bf16, amx, slow",
    [
        ("bf16", "cpu", False, False, True),
        ("bf16", "cpu", True, False, False),
        ("bf16", "cpu", False, True, False),
        ("float32", "cpu", False, False, False),
        ("bf16", "cuda", False, False, False),
    ],
)
def test_bf16_on_a_cpu_without_its_instructions_is_said_to_be_slow(
    monkeypatch, precision, device, avx512_bf16, amx, slow
):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    message = slow_precision(precision, torch.device(device))
    assert (message is not None) is slow
    assert not slow or "engine.precision=float32" in message
