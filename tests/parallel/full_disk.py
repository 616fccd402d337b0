"""A rank whose run folder's disk is full from a step: full_disk.py WHERE STEP CONFIG. Otherwise `mmtard train CONFIG`.

WHERE: "metrics", where no new file is made and no row is added, or "checkpoint", where only checkpoints have no room.
"""

import errno
import os
import sys

from mmtard.cli.main import main
from mmtard.distributed.processes import exit_process
from mmtard.files import writing
from mmtard.runs import checkpoints, journal

where, step, config = sys.argv[1], int(sys.argv[2]), sys.argv[3]
append, write_text, done = journal.Journal.append, writing.write_text, 0


def full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Full:
    """A file that takes no byte more."""

    def __init__(self, file):
        self.seek, self.truncate, self.fileno, self.close = file.seek, file.truncate, file.fileno, file.close

    def write(self, data):
        full()


def no_row(self, row):
    global done
    done = max(done, row["step"])
    if done >= step:
        self._file = Full(self._open())
    append(self, row)


if where == "metrics":
    journal.Journal.append = no_row
    writing.write_text = lambda *args, **more: full() if done >= step else write_text(*args, **more)
else:
    checkpoints.save_tensors = lambda *_: full()
exit_process(main(["train", config]))
