"""What a student may be, on two ranks and in every ZeRO stage: whole, with adapters, or with batch norm; its weights
averaged.
"""

import pytest
import torch

from .launch import run_ranks
from .students import DECAY, STEPS, plain, start
from .test_equivalence import settled

pytestmark = pytest.mark.slow
# Each case goes on in the next stage, so that with both of its stages every kind meets all four.
CASES = [("ema", 0), ("ema", 2), ("lora", 0), ("lora", 2), ("bn", 1), ("bn", 3), ("bnc", 2)]
CASES += [("bng", 2), ("lorag", 1)]
each = pytest.mark.parametrize("kind, stage", CASES)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Case -> what two ranks made of it."""
    folder = tmp_path_factory.mktemp("students")
    script = __file__.replace("test_students", "students")
    run_ranks([script, folder / "out.pt", *(f"{kind}-{stage}" for kind, stage in CASES)], 2, folder, "ranks")
    return torch.load(folder / "out.pt", weights_only=True)


@pytest.fixture(scope="module")
def alone():
    """Kind -> the same training in PyTorch alone, in this process."""
    return {kind: plain(kind) for kind, _ in CASES}


def assert_close(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(
            settled(name, value), settled(name, theirs[name]), rtol=1e-4, atol=2e-5, msg=lambda text: f"{name}: {text}"
        )


@each
def test_two_ranks_train_as_plain_pytorch_does(trained, alone, kind, stage):
    """With adapters: what dropout drops is no matter of the ranks, nor of graphs. It comes from the samples' seeds in
    integer arithmetic, so that the weights are compared as they are.
    """
    final = trained[f"{kind}-{stage}"]["weights"][-1]
    if not kind.startswith("bn"):
        return assert_close(final, {k: alone[kind][k] for k in final})
    # Before batch norm some gradients are rounding noise, and AdamW makes steps of them: whole tensors are compared
    # with how far they went.
    before = start(kind).state_dict()
    for name, value in final.items():
        gone, apart = ((x.double() - alone[kind][name]).norm().item() for x in (before[name], value))
        assert apart < 0.01 * gone or name.endswith("k_proj.bias"), name  # softmax cancels that one


@each
def test_a_run_goes_on_from_its_checkpoint_in_another_stage(trained, kind, stage):
    result = trained[f"{kind}-{stage}"]
    weights, states, updates = result["resumed"]
    assert updates == STEPS
    assert_close(weights, result["weights"][-1])
    assert_close(states, result["states"])


@each
def test_the_average_is_the_recurrence_in_float64(trained, kind, stage):
    result = trained[f"{kind}-{stage}"]
    expected = {k: v.detach().double() for k, v in start(kind).named_parameters() if v.requires_grad}
    for weights in result["weights"]:
        expected = {k: DECAY * v + (1 - DECAY) * weights[k].double() for k, v in expected.items()}
    assert result["updates"] == STEPS
    for name, value in expected.items():
        torch.testing.assert_close(result["states"][f"ema.{name}"].double(), value, rtol=1e-6, atol=1e-6)
        assert (result["weights"][-1][name] - value).abs().max() > 1e-3


@pytest.mark.parametrize("case", ["bng-2", "lorag-1"])
def test_a_compiled_student_is_one_graph_at_each_of_its_steps(trained, case):
    """Also after an update that was skipped, and where a collective or dropout is inside."""
    assert trained[case]["graphs"] == [1, 1] and trained[case]["said"] == []


@pytest.mark.parametrize("case", ["bn-1", "bn-3", "bnc-2", "bng-2"])
def test_batch_norm_statistics_are_the_same_on_all_ranks_and_after_resume(trained, case):
    result = trained[case]
    for ranks in result["buffers"]:
        assert len(ranks) == 2 and len(ranks[0]) == 3 * 19
        assert all(torch.equal(ranks[1][name], value) for name, value in ranks[0].items())
    whole, resumed = (ranks[0] for ranks in result["buffers"])
    assert whole["bn1.num_batches_tracked"] == resumed["bn1.num_batches_tracked"] == STEPS
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-4, atol=1e-5)
        assert not torch.equal(value, start("bn").visual.state_dict()[name])


def test_a_checkpoint_of_adapters_holds_nothing_else(trained):
    result = trained["lora-2"]
    assert len(result["weights"][-1]) == 8 and all(".lora_A." in k or ".lora_B." in k for k in result["weights"][-1])
    assert {k.partition(".")[2] for k in result["states"]} == set(result["weights"][-1])


def test_adapters_leave_the_weights_they_stand_on_alone(alone):
    before = start("lora").state_dict()
    assert all(torch.equal(v, before[k]) for k, v in alone["lora"].items() if ".lora_" not in k)
    assert all((alone["lora"][k] != before[k]).any() for k in before if ".lora_" in k)
