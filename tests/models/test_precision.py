"""TF32 is off inside and as it was outside, whichever of torch's two ways a process has used."""

import pytest
import torch

from mmtard.models.precision import full_float32

KINDS = torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def put_back():
    before = [kind.fp32_precision for kind in KINDS]
    yield
    for kind, precision in zip(KINDS, before):
        kind.fp32_precision = precision


@pytest.mark.parametrize("way", ["as it starts", "allow_tf32", "fp32_precision"])
def test_float32_is_float32_inside_and_as_before_afterwards(way):
    if way == "allow_tf32":
        torch.backends.cuda.matmul.allow_tf32 = True
    if way == "fp32_precision":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        torch.backends.cudnn.conv.fp32_precision = "tf32"
    before = [kind.fp32_precision for kind in KINDS]
    assert "tf32" in before
    with pytest.raises(ZeroDivisionError), full_float32():
        assert [kind.fp32_precision for kind in KINDS] == ["ieee"] * 3
        raise ZeroDivisionError
    assert [kind.fp32_precision for kind in KINDS] == before
    assert torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32 == (before[2] == "tf32")
