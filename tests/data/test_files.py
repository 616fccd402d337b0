"""Work spread over processes: what becomes of the processes when their parent is killed."""

import signal
import subprocess
import sys
import time

from processes import alive

from mmtard.files import held

WORK = """
import os, sys, time
from pathlib import Path
from mmtard.data.worker_pool import map_in_processes
from mmtard.files import exclusive

def wait(i):
    Path(sys.argv[1], str(os.getpid())).touch()
    time.sleep(600)

with exclusive(Path(sys.argv[1]) / "lock"):
    map_in_processes(wait, [0, 1], 2, "work", False)
"""


def test_the_workers_of_a_killed_parent_end_and_give_its_lock_free(tmp_path):
    parent = subprocess.Popen([sys.executable, "-c", WORK, str(tmp_path)])
    until = time.monotonic() + 60
    while len(workers := [p.name for p in tmp_path.iterdir() if p.name.isdigit()]) < 2:
        assert time.monotonic() < until and parent.poll() is None
        time.sleep(0.05)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < until, "they wait for ever"
        time.sleep(0.05)
    assert not held(tmp_path / "lock")
