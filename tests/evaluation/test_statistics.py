import math

import numpy as np
import pytest

from mmtard.evaluation.statistics import stratified, wilson_interval


def test_wilson_interval_of_fifty_in_a_hundred_by_hand():
    # p = 1/2, z^2 = 3.841459: the half-width is z * sqrt(1/400 + z^2/40000) / (1 + z^2/100),
    # 0.0998088 / 1.0384146 = 0.0961683
    assert wilson_interval(50, 100) == pytest.approx((0.4038, 0.5962), abs=5e-5)


@pytest.mark.parametrize("n, points", [(200, 6.9), (1000, 3.1), (5000, 1.4)])
def test_the_noise_of_the_usual_sample_sizes_at_fifty_percent(n, points):
    low, high = wilson_interval(n // 2, n)
    assert 50 * (high - low) == pytest.approx(points, abs=0.05)


@pytest.mark.parametrize("hits,n", [(1, 10), (7, 9), (312, 1000), (49_999, 50_000)])
def test_the_bounds_are_where_the_score_test_just_accepts(hits, n):
    """Wilson's definition: |hits/n - p| = z * sqrt(p (1 - p) / n) at both ends, the true p on either side."""
    low, high = wilson_interval(hits, n)
    assert 0 < low < hits / n < high < 1
    for p in (low, high):
        assert abs(hits / n - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / n), rel=1e-9)


def test_the_interval_holds_the_accuracy_itself_whatever_rounding_does():
    for n in range(1, 400):
        assert wilson_interval(n, n)[1] == 1 and wilson_interval(0, n)[0] == 0


def test_nothing_and_everything_right_still_leave_an_interval():
    upper = 1.959964**2 / (20 + 1.959964**2)  # hits = 0: p^2 = z^2 p (1 - p) / n, so p = z^2 / (n + z^2)
    assert wilson_interval(0, 20) == pytest.approx((0, upper), abs=1e-12)
    assert wilson_interval(20, 20) == pytest.approx((1 - upper, 1), abs=1e-12)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert all(0 <= b <= 1 for n in range(1, 60) for h in (0, n) for b in wilson_interval(h, n))


LABELS = np.random.Generator(np.random.PCG64(0)).permutation(np.repeat([-1, 0, 1, 2, 3], [40, 50, 30, 4, 20]))


@pytest.mark.parametrize(
    "n,counts",
    [(1, None), (8, [2, 2, 2, 2]), (16, [4, 4, 4, 4]), (19, [5, 5, 4, 5]), (64, [20, 20, 4, 20]), (75, None)],
)
def test_the_samples_are_spread_as_evenly_as_the_classes_allow(n, counts):
    ids = stratified(LABELS, n, seed=0)
    chosen = np.bincount(LABELS[ids], minlength=4)
    assert len(ids) == len(set(ids.tolist())) == n and (np.diff(ids) > 0).all()
    if counts:
        assert chosen.tolist() == counts
    full = chosen == [50, 30, 4, 20]  # a class gives less than another only when it has no more
    assert (chosen[~full] >= chosen.max() - 1).all()


def test_unlabelled_samples_are_never_chosen_and_none_means_all_labelled():
    labelled = [i for i, label in enumerate(LABELS.tolist()) if label != -1]
    assert len(labelled) == 104
    for n in (None, 104, 105, 10_000):
        assert stratified(LABELS, n, seed=3).tolist() == labelled
    assert set(stratified(LABELS, 100, seed=3).tolist()) < set(labelled)
    assert stratified(np.full(5, -1), 3, seed=0).tolist() == []


def test_the_seed_alone_decides_which():
    a, b, other = (stratified(LABELS, 40, seed).tolist() for seed in (5, 5, 6))
    assert a == b != other


def test_which_class_gets_the_odd_sample_and_which_samples_are_taken_is_not_biased_to_the_front():
    labels = np.tile([0, 1, 2], 100)
    odd = {int(np.bincount(labels[stratified(labels, 4, s)]).argmax()) for s in range(30)}
    assert odd == {0, 1, 2}
    mean = np.mean([stratified(labels, 30, s).mean() for s in range(30)])
    assert abs(mean - 149.5) < 5 * 300 / math.sqrt(12 * 900)  # five standard errors of 900 uniform ids
