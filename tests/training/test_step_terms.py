import numpy as np
import pytest
import torch

from mmtard.training.step_terms import TermSums


class TwoRanks:
    """Another rank's share beside ours."""

    def __init__(self, other):
        self.other = other

    def all_gather(self, own):
        return [own, self.other.weights]


def terms(*micro_batches):
    made = TermSums()
    for values in micro_batches:
        made.add({"loss": torch.ones(len(values)), "w_clean": torch.tensor(values)})
    return made


def test_sums_and_quantiles_are_those_of_the_global_batch_whoever_holds_which_sample():
    values = [float(v) for v in np.random.Generator(np.random.PCG64(3)).permutation(20) ** 2]
    a, b = terms(values[:4], values[4:12]), terms(values[12:])
    assert a.sums == {"loss": 12.0, "w_clean": sum(values[:12])}
    found = a.quantiles(TwoRanks(b))
    # the squares of 0..19, linear between order statistics: position 1.9 between 1 and 4, 9.5 between 81 and 100,
    # 17.1 between 289 and 324
    assert found == pytest.approx({"w_clean_p10": 1 + 0.9 * 3, "w_clean_p50": 90.5, "w_clean_p90": 289 + 0.1 * 35})
    assert b.quantiles(TwoRanks(a)) == terms(values[::-1]).quantiles(TwoRanks(terms([]))) == found


def test_without_weights_nothing_is_gathered():
    made = TermSums()
    made.add({"loss": torch.ones(3)})
    assert made.quantiles(None) == {}
