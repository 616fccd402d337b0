"""Differences over samples and seeds, fronts and speed-ups, against simulated data whose answer is known."""

import itertools

import numpy as np
import pytest

from mmtard.study.crossed import difference_over_seeds, holm, t_quantile, two_sided_p
from mmtard.study.efficiency import Trajectory, own_speed_up, reached, speed_up
from mmtard.study.front import Resampling, area, clean_at, estimate, front, staircase

SEEDS, SAMPLES = 3, 200


def simulated(rng, effect=0.0, seed_sd=0.0, sample_sd=0.0, noise=1.0, seeds=SEEDS, samples=SAMPLES):
    """Differences of the model that the test assumes, as two arrays [S,N]: nothing, and the differences."""
    u, v = rng.normal(0, seed_sd, (seeds, 1)), rng.normal(0, sample_sd, (1, samples))
    d = effect + u + v + rng.normal(0, noise, (seeds, samples))
    return np.zeros_like(d), d


@pytest.mark.slow
@pytest.mark.parametrize(
    "kinds",
    [
        {"noise": 1.0},
        {"noise": 1.0, "seed_sd": 0.14},
        {"noise": 1.0, "seed_sd": 0.14, "sample_sd": 0.5},
        {"noise": 1.0, "seed_sd": 0.22, "sample_sd": 0.55},
        {"noise": 1.0, "seed_sd": 0.5},
        {"noise": 1.0, "sample_sd": 2.0},
        {"noise": 1.0, "seed_sd": 0.1, "sample_sd": 1.0},
    ],
    ids=lambda kinds: "+".join(f"{k}={v}" for k, v in kinds.items()),
)
def test_where_nothing_differs_five_in_a_hundred_studies_say_so(kinds):
    rng = np.random.default_rng(0)
    n = 1500
    found = [difference_over_seeds(*simulated(rng, **kinds)) for _ in range(n)]
    rate = sum(d.p < 0.05 for d in found) / n
    # Two standard errors of 1500 are 1.1 points at 5 in a hundred. Satterthwaite's approximation is careful where seeds
    # and samples add nothing, and two points careless at its worst, where seeds add ten times what is left.
    assert rate < (0.085 if kinds.get("seed_sd") == 0.22 else 0.065)
    assert rate > 0.01 or kinds == {"noise": 1.0}
    assert sum(d.p < 0.01 for d in found) / n < 0.03 and sum(d.p < 0.001 for d in found) / n < 0.005
    covered = sum(d.low <= 0 <= d.high for d in found) / n
    assert covered == pytest.approx(1 - rate, abs=1e-9)


def test_a_test_over_samples_alone_would_call_seeds_a_difference():
    """What the mixed model is for: with seeds that differ, McNemar's kind of test finds differences of no method."""
    rng = np.random.default_rng(1)
    data = [simulated(rng, seed_sd=0.5) for _ in range(300)]
    over_samples = [difference_over_seeds(a.mean(0, keepdims=True), b.mean(0, keepdims=True)).p < 0.05 for a, b in data]
    over_both = [difference_over_seeds(a, b).p < 0.05 for a, b in data]
    assert np.mean(over_samples) > 0.5 and np.mean(over_both) < 0.09


def test_a_difference_that_is_there_is_found_with_its_size():
    rng = np.random.default_rng(2)
    found = [difference_over_seeds(*simulated(rng, effect=0.3, seed_sd=0.02, sample_sd=0.5)) for _ in range(300)]
    assert np.mean([d.mean for d in found]) == pytest.approx(0.3, abs=0.01)
    assert np.mean([d.p < 0.05 for d in found]) > 0.9
    assert np.mean([d.low <= 0.3 <= d.high for d in found]) > 0.92


def test_right_and_wrong_flags_are_compared_pair_by_pair():
    """By hand: one seed, four samples, b alone is right on two of them: mean 1/2, variance 1/3 over 4 samples."""
    a, b = np.array([[False, False, True, True]]), np.array([[True, True, True, True]])
    found = difference_over_seeds(a, b)
    assert (found.mean, found.seeds, found.samples, found.freedom) == (0.5, 1, 4, 3)
    half = 3.182446305284263 * np.sqrt(1 / 3 / 4)  # t of 3 degrees of freedom
    assert (found.low, found.high) == pytest.approx((0.5 - half, 0.5 + half))


def test_the_variance_is_that_of_the_analysis_of_variance():
    """Against the mean squares written out as sums over the table."""
    rng = np.random.default_rng(3)
    _, d = simulated(rng, seed_sd=1.0, sample_sd=1.0, seeds=4, samples=30)
    s, n = d.shape
    grand = d.mean()
    ms_seeds = n * sum((d[i].mean() - grand) ** 2 for i in range(s)) / (s - 1)
    ms_samples = s * sum((d[:, j].mean() - grand) ** 2 for j in range(n)) / (n - 1)
    ms_left = sum(
        (d[i, j] - d[i].mean() - d[:, j].mean() + grand) ** 2 for i, j in itertools.product(range(s), range(n))
    ) / ((s - 1) * (n - 1))
    assert ms_seeds > ms_left and ms_samples > ms_left
    total = ms_seeds + ms_samples - ms_left
    freedom = total**2 / (ms_seeds**2 / (s - 1) + ms_samples**2 / (n - 1) + ms_left**2 / ((s - 1) * (n - 1)))
    found = difference_over_seeds(np.zeros_like(d), d)
    half = t_quantile(0.975, freedom) * np.sqrt(total / (s * n))
    assert found.freedom == pytest.approx(freedom)
    assert found.high - found.mean == pytest.approx(half)


def test_models_that_never_differ_have_no_difference():
    same = np.ones((3, 10), dtype=bool)
    assert difference_over_seeds(same, same).p == 1.0
    with pytest.raises(ValueError, match="give two alike"):
        difference_over_seeds(same, same[:2])


@pytest.mark.parametrize("freedom", [1.0, 2.0, 2.7, 10.0, 300.0, 1e5])
def test_students_t_is_scipys(freedom):
    stats = pytest.importorskip("scipy.stats")
    for t in (0.0, 0.3, 1.0, 2.5, 6.0, 12.0):
        assert two_sided_p(t, freedom) == pytest.approx(2 * stats.t.sf(t, freedom), rel=1e-9, abs=1e-300)
    assert t_quantile(0.975, freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-9)


def test_holms_p_values_are_those_of_his_paper():
    """By hand: 0.01 * 3, then max(0.03, 0.02 * 2), then max(0.04, 0.03)."""
    assert holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


# ---------------------------------------------------------------- fronts


def counted_area(points, reference, cells=400):
    """The dominated area by brute force: the share of a grid's cells whose middle some point dominates."""
    middles = (np.arange(cells) + 0.5) / cells
    x, y = np.meshgrid(middles, middles)
    inside = np.zeros_like(x, dtype=bool)
    for clean, robust in points:
        inside |= (x <= clean) & (y <= robust) & (x >= reference[0]) & (y >= reference[1])
    return inside.mean()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("reference", [(0.0, 0.0), (0.3, 0.2)])
def test_the_dominated_area_is_the_one_counted_by_brute_force(seed, reference):
    points = np.random.default_rng(seed).uniform(0, 1, (1 + seed, 2))
    # A staircase of P points crosses at most 2 P cells a row or column of the grid.
    assert area(points, reference) == pytest.approx(counted_area(points, reference), abs=2 * (1 + seed) / 400)


def test_the_front_holds_exactly_the_points_that_none_dominates():
    rng = np.random.default_rng(5)
    for _ in range(50):
        points = rng.integers(0, 6, (9, 2)) / 5
        beaten = [any((q >= p).all() and (q > p).any() for q in points) for p in points]
        kept = {tuple(points[i]) for i in front(points)}
        assert kept == {tuple(p) for p, is_beaten in zip(points, beaten) if not is_beaten}
        assert len(front(points)) == len(kept)


def test_the_line_that_is_drawn_is_the_border_of_the_dominated_area():
    rng = np.random.default_rng(8)
    for _ in range(20):
        points = rng.uniform(0, 1, (6, 2))
        border = staircase(points)[::-1]  # by rising clean accuracy
        under = border[0, 0] * border[0, 1] + np.sum(np.diff(border[:, 0]) * (border[1:, 1] + border[:-1, 1]) / 2)
        assert under == pytest.approx(area(points))


def test_a_point_of_trade_adds_only_its_corner_and_a_dominated_one_nothing():
    base = np.array([[0.8, 0.4]])
    assert area(base) == pytest.approx(0.32)
    assert area(np.vstack([base, [0.7, 0.5]])) == pytest.approx(0.32 + 0.7 * 0.1)
    assert area(np.vstack([base, [0.7, 0.4]])) == pytest.approx(0.32)


def test_clean_accuracy_at_equal_robustness_lies_between_the_fronts_points():
    points = np.array([[0.8, 0.4], [0.7, 0.5], [0.6, 0.45]])
    assert clean_at(points, 0.45) == pytest.approx(0.75)
    assert clean_at(points, 0.1) == pytest.approx(0.8)
    assert np.isnan(clean_at(points, 0.6)) and np.isnan(clean_at(points[:0], 0.1))


def test_another_point_never_lowers_the_clean_accuracy_at_equal_robustness():
    two = np.array([[0.8, 0.2], [0.2, 0.8]])
    assert clean_at(two, 0.5) == clean_at(np.vstack([two, [0.3, 0.5]]), 0.5) == pytest.approx(0.5)
    rng = np.random.default_rng(9)
    for _ in range(200):
        points, robust = rng.uniform(0, 1, (6, 2)), rng.uniform(0, 0.8)
        fewer, more = clean_at(points[:5], robust), clean_at(points, robust)
        assert np.isnan(fewer) or more >= fewer - 1e-12


# ---------------------------------------------------------------- resampling and speed


def test_the_p_of_resamples_is_twice_the_share_beyond_zero():
    drawn = np.concatenate([np.full(30, -0.1), np.full(969, 0.2)])
    found = estimate(0.19, drawn)
    assert found.p == pytest.approx(2 * 31 / 1000) and (found.low, found.high) == (-0.1, 0.2)
    assert estimate(0.2, np.full(1999, 0.2)).p == pytest.approx(1e-3) and estimate(0.0, np.zeros(10)).p == 1.0
    some_known = estimate(0.2, np.array([np.nan] + [0.2] * 99))
    assert some_known.unknown == pytest.approx(0.01) and some_known.p == pytest.approx(4 / 101)
    half_known = estimate(0.2, np.array([np.nan, 0.2] * 50))
    assert half_known.unknown == 0.5 and half_known.p == 1.0


def test_where_no_fronts_differ_their_p_is_rarely_small():
    """Twenty seeds, which a bootstrap needs: the share of studies with p < .05 where both methods are one."""
    rng, found = np.random.default_rng(8), []
    for _ in range(200):
        lean = rng.normal(0, 0.15, (2, 20, 1, 1))
        flags = rng.uniform(size=(2, 20, 1, 150)) < 0.5 + lean
        draws = Resampling.draw(200, 20, 150)
        a, b = (draws.means(f)[:, 0] for f in flags)
        found.append(estimate(flags[0].mean() - flags[1].mean(), a - b).p < 0.05)
    assert 0 < np.mean(found) < 0.09


def test_resampled_means_spread_as_seeds_and_samples_make_them():
    rng = np.random.default_rng(6)
    flags = rng.uniform(size=(40, 1, 2000)) < rng.uniform(0.3, 0.7, (40, 1, 1))
    means = Resampling.draw(3000, 40, 2000).means(flags)[:, 0]
    assert means.mean() == pytest.approx(flags.mean(), abs=0.003)
    of_seeds = flags.mean(2).std() / np.sqrt(40)
    assert means.std() == pytest.approx(of_seeds, rel=0.1)  # samples add little here


def test_the_time_to_a_target_lies_on_the_line_between_two_states():
    costs, accuracies = np.array([10.0, 20.0, 30.0]), np.array([0.1, 0.3, 0.5])
    assert reached(costs, accuracies, 0.4) == pytest.approx(25)
    assert reached(costs, accuracies, 0.05) == 10 and reached(costs, accuracies, 0.6) == float("inf")


def test_a_method_that_learns_twice_as_fast_is_found_to_and_its_interval_holds_two():
    rng = np.random.default_rng(7)
    costs = np.arange(1, 9) * 10.0

    def curve(speed):
        share = 0.6 * (1 - np.exp(-speed * costs / 40))
        return Trajectory(np.tile(costs, (3, 1)), rng.uniform(size=(3, 8, 4000)) < share[None, :, None])

    baseline, method = curve(1.0), curve(2.0)
    found = speed_up(method, baseline, Resampling.draw(400, 3, 4000))
    assert found.value == pytest.approx(2.0, abs=0.2) and found.low < 2 < found.high
    assert found.low > 1.5
    slow = speed_up(curve(0.5), baseline, Resampling.draw(200, 3, 4000))
    assert slow.value == 0.0  # never as high within the budget
    assert 1.0 <= own_speed_up(baseline) < 1.2


def test_seeds_that_took_longer_widen_the_interval_of_seconds():
    flags = np.ones((3, 2, 50), dtype=bool)
    flags[:, 0] = False
    baseline = Trajectory(np.tile([5.0, 10.0], (3, 1)), flags)
    method = Trajectory(np.array([[5.0, 10.0], [5.0, 10.0], [10.0, 20.0]]), flags)
    found = speed_up(method, baseline, Resampling.draw(400, 3, 50))
    # At the last state alone: 10 s of the baseline, against 10 s and 20 s.
    assert found.value == pytest.approx(10 / (40 / 3)) and (found.low, found.high) == pytest.approx((0.5, 1.0))
