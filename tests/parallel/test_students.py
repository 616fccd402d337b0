"""What a student may be, on two ranks and in every ZeRO stage: averaged weights."""

import pytest
import torch

from .launch import run_ranks
from .students import DECAY, STEPS, start
from .test_equivalence import settled

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Case -> what two ranks made of it."""
    folder = tmp_path_factory.mktemp("students")
    script = __file__.replace("test_students", "students")
    run_ranks([script, folder / "out.pt", *(f"ema-{stage}" for stage in range(4))], 2, folder, "ranks")
    return torch.load(folder / "out.pt", weights_only=True)


@pytest.mark.parametrize("stage", range(4))
def test_the_average_is_the_recurrence_in_float64(trained, stage):
    result = trained[f"ema-{stage}"]
    expected = {k: v.detach().double() for k, v in start("ema").named_parameters()}
    for weights in result["weights"]:
        expected = {k: DECAY * v + (1 - DECAY) * weights[k].double() for k, v in expected.items()}
    assert result["updates"] == STEPS
    for name, value in expected.items():
        torch.testing.assert_close(result["states"][f"ema.{name}"].double(), value, rtol=1e-6, atol=1e-6)
        assert (result["weights"][-1][name] - value).abs().max() > 1e-3


@pytest.mark.parametrize("stage", range(4))
def test_a_run_goes_on_from_its_checkpoint_in_another_stage(trained, stage):
    result = trained[f"ema-{stage}"]
    weights, states, updates = result["resumed"]
    assert updates == STEPS
    for ours, theirs in ((weights, result["weights"][-1]), (states, result["states"])):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            torch.testing.assert_close(settled(name, value), settled(name, theirs[name]), rtol=1e-4, atol=1e-5, msg=name)
