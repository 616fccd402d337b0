"""The order in which samples are read: a pure function of the seed and of how many samples were consumed.

Epoch e: the shards, permuted by (seed, e), are laid end to end and cut into L equal lanes; each lane is shuffled in
windows. Every global batch takes as many consecutive samples of each lane; rank r owns the lanes l with l mod world =
r. So neither the number of ranks nor of loader processes changes what is read at a step.

N mod L samples are left over at the end and are not read in the epoch. They are others each time, since another shard
is laid last; a single shard is always last, so that its samples are laid in a circle which begins where the epoch
before stopped reading.
"""

from collections import OrderedDict

import numpy as np

from ..errors import UserError
from ..seeding import permutation

_SHARDS, _WINDOW = 1, 2  # lead the seed of each kind of shuffle, so that no two kinds share a stream


class Order:
    """The endless sequence of sample ids over shards of `shard_counts` [S] samples.

    N mod lanes samples are left out in an epoch, others each time. Raises UserError for more lanes than samples.
    """

    def __init__(self, shard_counts, seed: int, lanes: int, window: int):
        self.counts = np.asarray(shard_counts, dtype=np.int64)
        self.seed, self.lanes, self.window = int(seed), int(lanes), int(window)
        self.lane_length = int(self.counts.sum()) // self.lanes
        if self.lane_length == 0:
            raise UserError(
                f"data.lanes: {lanes} lanes for {int(self.counts.sum())} samples; use at most as many lanes as samples"
            )
        self._first_id = np.cumsum(self.counts) - self.counts
        self._epochs: OrderedDict[int, tuple] = OrderedDict()
        self._windows: OrderedDict[tuple, np.ndarray] = OrderedDict()

    @property
    def epoch_samples(self) -> int:
        """Samples in an epoch: all but the N mod lanes left out."""
        return self.lane_length * self.lanes

    def batch(self, consumed: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """The global batch after `consumed` samples, lane after lane: sample ids int64 [B], their epochs int64 [B]."""
        return self.rank_batch(consumed, batch_size, 0, 1)

    def rank_batch(self, consumed: int, batch_size: int, rank: int, world: int) -> tuple[np.ndarray, np.ndarray]:
        """The part of the global batch in lanes rank, rank + world, ...: ids int64 [B/world], epochs int64 [B/world].

        `consumed` and `batch_size` count samples of all ranks. Raises UserError when lanes, ranks and batch do not
        divide.
        """
        start = self._lane_position(consumed, rank, world)
        if batch_size % self.lanes:
            raise UserError(
                f"data.lanes: {self.lanes} lanes do not divide the batch of {batch_size}; "
                "make it a divisor of the batch size"
            )
        each = batch_size // self.lanes
        runs = [run for lane in range(rank, self.lanes, world) for run in self._lane_runs(lane, start, each)]
        epochs = np.concatenate([np.full(len(places), epoch, dtype=np.int64) for epoch, places in runs])
        places = np.concatenate([places for _, places in runs])
        ids = np.empty_like(places)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            ids[chosen] = self._ids(int(epoch), places[chosen])
        return ids, epochs

    def shards_ahead(self, consumed: int, rank: int, world: int, n: int) -> tuple[list[int], list[int]]:
        """The shards under the windows in which a rank's lanes stand, and at least `n` others it needs next.

        The others come soonest first, window by window of all lanes, which cross into the next window together; fewer
        than `n` where an epoch ahead holds no more, none for n = 0.
        """
        start = self._lane_position(consumed, rank, world)
        under_lanes: dict[int, None] = {}
        next_needed: dict[int, None] = {}
        for step in range(-(-self.lane_length // self.window) + 1):
            for lane in range(rank, self.lanes, world):
                for shard in self._window_shards(lane, start, step):
                    if step == 0:
                        under_lanes.setdefault(shard)
                    elif shard not in under_lanes:
                        next_needed.setdefault(shard)
            if len(next_needed) >= n:
                break
        return list(under_lanes), list(next_needed)

    def _lane_position(self, consumed: int, rank: int, world: int) -> int:
        if self.lanes % world or not 0 <= rank < world:
            raise UserError(
                f"data.lanes: {self.lanes} lanes cannot be shared by {world} ranks (rank {rank}); "
                f"make it a multiple of {world}"
            )
        if consumed % self.lanes:
            raise UserError(
                f"data.lanes: {consumed} samples consumed do not divide over {self.lanes} lanes; "
                "keep the lanes the run began with"
            )
        return consumed // self.lanes

    def _lane_runs(self, lane: int, position: int, count: int):
        """(epoch, places in the epoch's sequence [n]) for `count` samples of a lane, split where a window ends."""
        while count:
            epoch, offset = divmod(position, self.lane_length)
            number, inside = divmod(offset, self.window)
            shuffle = self._window_shuffle(epoch, lane, number)
            taken = shuffle[inside : inside + count]
            yield epoch, lane * self.lane_length + number * self.window + taken
            position, count = position + len(taken), count - len(taken)

    def _window_shuffle(self, epoch: int, lane: int, number: int) -> np.ndarray:
        key = (epoch, lane, number)
        if key not in self._windows:
            size = min(self.window, self.lane_length - number * self.window)
            self._windows[key] = permutation(size, _WINDOW, self.seed, *key)
            if len(self._windows) > 2 * self.lanes:
                self._windows.popitem(last=False)
        return self._windows[key]

    def _epoch_layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's shards in order [S], and the place in its sequence at which each ends [S]."""
        if epoch not in self._epochs:
            shards = permutation(len(self.counts), _SHARDS, self.seed, epoch)
            self._epochs[epoch] = shards, np.cumsum(self.counts[shards])
            if len(self._epochs) > 3:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _ids(self, epoch: int, places: np.ndarray) -> np.ndarray:
        if len(self.counts) == 1:
            # Nothing moves in epoch 0, nor where no sample is left over.
            total = int(self.counts[0])
            return (places + epoch * self.epoch_samples) % total
        shards, ends = self._epoch_layout(epoch)
        slot = np.searchsorted(ends, places, side="right")
        return self._first_id[shards[slot]] + places - (ends[slot] - self.counts[shards[slot]])

    def _window_shards(self, lane: int, position: int, step: int) -> list[int]:
        """The shards under the `step`-th window of a lane, counted from the one that holds `position`."""
        per_epoch = -(-self.lane_length // self.window)
        epoch, offset = divmod(position, self.lane_length)
        epochs_ahead, number = divmod(offset // self.window + step, per_epoch)
        first = lane * self.lane_length + number * self.window
        last = lane * self.lane_length + min((number + 1) * self.window, self.lane_length) - 1
        shards, ends = self._epoch_layout(epoch + epochs_ahead)
        a, b = np.searchsorted(ends, [first, last], side="right")
        return [int(s) for s in shards[a : b + 1] if self.counts[s]]
