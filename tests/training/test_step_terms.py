import numpy as np
import pytest
import torch

from mmtard.training.step_terms import StepTotals, TermSums


class TwoRanks:
    """Another rank's numbers beside ours."""

    def __init__(self, other):
        self.other, self.asked = other, 0

    def gather_numbers(self, own):
        self.asked += 1
        return torch.stack([own, self.other.pack([2.0, 0.0])])


def terms(*micro_batches):
    made = TermSums()
    for values in micro_batches:
        made.add({"loss": torch.ones(len(values)), "w_clean": torch.tensor(values), "w_x": torch.tensor(values[::-1])})
    return made


def test_sums_and_quantiles_are_those_of_the_global_batch_whoever_holds_which_sample():
    values = [float(v) for v in np.random.Generator(np.random.PCG64(3)).permutation(20) ** 2]
    a, b = terms(values[:4], values[4:10]), terms(values[10:])
    ranks = TwoRanks(b)
    found = a.total([40.0, 1.0], ranks)
    assert ranks.asked == 1, "one collective a step"
    assert found.sums == {"loss": 20.0, "w_clean": sum(values), "w_x": sum(values)} and found.counts == [42.0, 1.0]
    # the squares of 0..19, linear between order statistics: position 1.9 between 1 and 4, 9.5 between 81 and 100,
    # 17.1 between 289 and 324
    expected = {"p10": 1 + 0.9 * 3, "p50": 90.5, "p90": 289 + 0.1 * 35}
    assert found.quantiles == pytest.approx(
        {f"{name}_{p}": value for name in ("w_clean", "w_x") for p, value in expected.items()}
    )
    other_way = terms(values[::-1][:10]).total([40.0, 1.0], TwoRanks(terms(values[::-1][10:])))
    assert other_way.quantiles == found.quantiles


def test_a_number_goes_through_the_collective_bit_for_bit():
    """A batch's digest of seeds is a whole number up to 2**42; sums are float64."""
    made = TermSums()
    made.add({"loss": torch.tensor([0.1, 0.2])})
    packed = made.pack([2.0**42 + 1, 1.0])
    assert made.unpack(packed[None].numpy(), 2) == StepTotals(
        {"loss": float(np.float32(0.1)) + float(np.float32(0.2))}, [2.0**42 + 1, 1.0], {}
    )
