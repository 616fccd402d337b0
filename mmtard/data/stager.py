"""The thread that fetches remote shards ahead of the samples that are read from them."""

import signal
import threading

from ..errors import UserError
from .order import Order
from .paths import is_remote
from .staging import Staging

# A scheduler sends these to a whole job; only the training loop may react to them.
SHIELDED = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}


class Stager:
    """A thread that keeps fetched the shards a rank reads now, and at least `cache.ahead` more where they fit."""

    def __init__(self, staging: Staging, order: Order, rank: int, world: int):
        self.staging, self.order, self.rank, self.world = staging, order, rank, world
        self._moved = threading.Condition()
        self._consumed: int | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="stager", daemon=True)

    def check(self, consumed: int) -> None:
        """Raises UserError when the shards a rank reads at once do not fit: each sample would fetch its shard anew."""
        now, _ = self.order.shards_ahead(consumed, self.rank, self.world, 0)
        sizes = [int(self.staging.dataset.shard_sizes[s]) for s in now if is_remote(self.staging.dataset.paths[s])]
        if sum(sizes) > self.staging.limit:
            need = f"the {len(sizes)} shards a rank reads at once ({sum(sizes) / 1e9:.3g} GB)"
            raise UserError(
                f"data.cache.max_gb: {self.staging.cache.max_gb} GB cannot hold {need}; raise it or lower data.lanes"
            )

    def advance(self, consumed: int) -> None:
        """Tell the stager how many samples were consumed; starts it the first time."""
        with self._moved:
            self._consumed = consumed
            self._moved.notify()
        if self._thread.ident is None:
            self._thread.start()

    def close(self) -> None:
        """Let the thread end, after the fetch that it is in."""
        with self._moved:
            self._closed = True
            self._moved.notify()

    def _run(self) -> None:
        # An opener's program inherits this mask, so a signal to the job does not break a fetch.
        signal.pthread_sigmask(signal.SIG_BLOCK, SHIELDED)
        while True:
            with self._moved:
                self._moved.wait_for(lambda: self._closed or self._consumed is not None)
                if self._closed:
                    return
                consumed, self._consumed = self._consumed, None
            now, later = self.order.shards_ahead(consumed, self.rank, self.world, self.staging.cache.ahead)
            room = self.staging.limit
            for shard in now + later:
                room -= int(self.staging.dataset.shard_sizes[shard])
                if room < 0 or self._closed or self._consumed is not None:
                    break  # without room, fetching more would evict what was fetched for this rank
                try:
                    self.staging.ensure(shard)
                except UserError:
                    break  # the reader that needs the shard meets the same error and reports it
