"""A rank that stores embeddings, is stopped by a signal to the last rank alone, and goes on. Usage: store_twice.py
CONFIG.
"""

import sys

from mmtard import config
from mmtard.distributed import ranks as process_group
from mmtard.distributed.interruption import Interruption
from mmtard.distributed.processes import exit_process
from mmtard.embeddings.build import cache
from mmtard.errors import RunError


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
    ranks = process_group.start("cpu")
    process_group.stop, stop = lambda *_: None, process_group.stop
    try:
        cache(settings, After(8) if ranks.rank == ranks.world_size - 1 else Interruption())
    except RunError as error:
        print(ranks.all_gather((error.status, str(error))), flush=True)
    cache(settings, Interruption())
    stop()
    exit_process(0)
