"""A rank that stores embeddings, is stopped by a signal to the last rank alone, and goes on. Usage: store_twice.py CONFIG."""

import sys

from mmtard import config, parallel
from mmtard.cache import cache
from mmtard.errors import RunError
from mmtard.lifetime import leave
from mmtard.preempt import Interruption


class After(Interruption):
    """Comes when it has been asked about so often."""

    def __init__(self, times: int):
        super().__init__()
        self.times = times

    def __bool__(self) -> bool:
        self.times -= 1
        self.signal = "SIGUSR2" if self.times < 0 else None
        return self.signal is not None


if __name__ == "__main__":
    settings = config.load(sys.argv[1])
    ranks = parallel.start("cpu")
    parallel.stop, stop = lambda: None, parallel.stop
    try:
        cache(settings, After(8) if ranks.rank == ranks.world_size - 1 else Interruption())
    except RunError as error:
        print(ranks.gather((error.status, str(error))), flush=True)
    cache(settings, Interruption())
    stop()
    leave(0)
