import numpy as np
import pytest

from mmtard.data.order import Order
from mmtard.errors import UserError
from mmtard.seeding import permutation, sample_seeds

COUNTS = [11, 7, 14, 5, 9]  # 46 samples


def test_an_epoch_has_every_sample_once_but_the_tail_and_epochs_differ():
    order = Order(COUNTS, seed=3, lanes=4, window=6)
    assert order.epoch_samples == 44
    epochs = []
    for e in range(4):
        ids, numbers = order.batch(e * 44, 44)
        assert set(numbers) == {e} and len(set(ids)) == 44 and set(ids) <= set(range(46))
        epochs.append(ids)
    assert not any((a == b).all() for a, b in zip(epochs, epochs[1:]))
    assert len({frozenset(range(46)) - frozenset(e.tolist()) for e in epochs}) > 1, (
        "the same samples are left out each time"
    )


def test_every_sample_of_a_single_shard_is_read_though_lanes_do_not_divide_it():
    order = Order([10], seed=3, lanes=4, window=6)
    epochs = [order.batch(e * 8, 8)[0].tolist() for e in range(5)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert set(sum(epochs, [])) == set(range(10)), "samples 8 and 9 were never read before"
    assert [sorted(set(range(10)) - set(epoch)) for epoch in epochs] == [[8, 9], [6, 7], [4, 5], [2, 3], [0, 1]]


def test_a_single_shard_that_lanes_divide_keeps_its_order_and_so_does_every_first_epoch():
    """The order of before: lane by lane, the places that the window's shuffle gives, the same laying each epoch."""
    for count in (12, 10):
        order = Order([count], seed=3, lanes=4, window=2)
        for epoch in range(3 if count == 12 else 1):
            each = count // 4
            laid = [
                place
                for lane in range(4)
                for number in range(-(-each // 2))
                for place in lane * each
                + number * 2
                + permutation(min(2, each - 2 * number), 2, 3, epoch, lane, number)
            ]
            ids = order.batch(epoch * 4 * each, 4 * each)[0]
            assert ids.tolist() == laid


def test_a_batch_crosses_from_one_epoch_into_the_next():
    order = Order(COUNTS, seed=3, lanes=4, window=6)
    ids, epochs = order.batch(40, 8)
    assert epochs.tolist() == [0, 1] * 4
    assert ids[0::2].tolist() == order.batch(40, 4)[0].tolist() and ids[1::2].tolist() == order.batch(44, 4)[0].tolist()


def test_lanes_read_their_part_of_the_permuted_shards_in_shuffled_windows():
    order = Order([10] * 6, seed=0, lanes=2, window=15)
    ids, _ = order.batch(0, 60)
    for lane in ids.reshape(2, 30):
        for window in lane.reshape(2, 15):
            shards = sorted({int(i) // 10 for i in window})
            assert len(shards) == 2, "a window of 15 spans two shards of 10"
            assert (np.abs(np.diff(window)) > 1).sum() > 7, "the window is in the order of the shard"


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_together_read_the_global_batch(world):
    order = Order(COUNTS, seed=5, lanes=8, window=3)
    for consumed in (0, 16, 48):
        whole, _ = order.batch(consumed, 16)
        parts = [
            Order(COUNTS, seed=5, lanes=8, window=3).rank_batch(consumed, 16, r, world)[0].reshape(-1, 2)
            for r in range(world)
        ]
        assert np.stack(parts, 1).reshape(-1).tolist() == whole.tolist()


def test_position_alone_decides():
    a, b = (Order(COUNTS, seed=1, lanes=2, window=4) for _ in range(2))
    in_order = [a.batch(c, 4)[0].tolist() for c in range(0, 400, 4)]
    backwards = [b.batch(c, 4)[0].tolist() for c in reversed(range(0, 400, 4))]
    assert in_order == backwards[::-1]
    assert a.batch(0, 40)[0].tolist() != Order(COUNTS, seed=2, lanes=2, window=4).batch(0, 40)[0].tolist()


def test_the_order_is_the_documented_one():
    """One lane, one window, from numpy's raw Philox output and sorting alone."""
    raw = [
        np.random.Philox(np.random.SeedSequence(s)).random_raw(n).tolist()
        for s, n in (((1, 9, 0), 3), ((2, 9, 0, 0, 0), 6))
    ]
    shards, places = (sorted(range(len(r)), key=r.__getitem__) for r in raw)
    laid = [i for s in shards for i in ([0, 1], [2], [3, 4, 5])[s]]
    assert Order([2, 1, 3], seed=9, lanes=1, window=100).batch(0, 6)[0].tolist() == [laid[p] for p in places]


def test_shards_ahead_names_what_is_read_in_time():
    order = Order([10] * 12, seed=4, lanes=4, window=5)
    for rank in range(2):
        for consumed in range(0, 200, 20):
            now, later = order.shards_ahead(consumed, rank, 2, 3)
            assert len(later) >= 3 and not set(now) & set(later) and len(set(later)) == len(later)
            read = {
                int(i) // 10 for i in order.rank_batch(consumed, 40, rank, 2)[0]
            }  # the rest of this window and all of the next
            assert read <= set(now) | set(later)
    assert order.shards_ahead(0, 0, 2, 0)[1] == []
    assert len(sum(order.shards_ahead(0, 0, 1, 99), [])) == 12


@pytest.mark.parametrize("call, words", [
    (lambda: Order([3], 0, lanes=4, window=1), "4 lanes for 3 samples"),
    (lambda: Order([30], 0, lanes=4, window=1).batch(0, 6), "4 lanes do not divide the batch of 6"),
    (lambda: Order([30], 0, lanes=4, window=1).rank_batch(0, 8, 0, 3), "4 lanes cannot be shared by 3 ranks"),
    (lambda: Order([30], 0, lanes=4, window=1).batch(6, 8), "6 samples consumed"),
])  # fmt: skip
def test_what_does_not_divide_is_refused(call, words):
    with pytest.raises(UserError, match=words):
        call()


def test_sample_seeds_are_splitmix64():
    def mix(x):
        z = (x + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    assert mix(0) == 0xE220A8397B1DCDAF, "the published first output of SplitMix64 from 0"
    got = sample_seeds(7, [0, 0, 1, 3], [0, 1, 0, 1281166])
    assert got.dtype == np.uint64
    assert got.tolist() == [mix(mix(mix(7) ^ e) ^ i) for e, i in ((0, 0), (0, 1), (1, 0), (3, 1281166))]
    assert len(set(sample_seeds(0, np.zeros(10000, int), np.arange(10000)).tolist())) == 10000
