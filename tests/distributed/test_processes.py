"""The end of a process: what it still has to say is said, and no thread of torch turns it into a crash."""

import os
import resource
import subprocess
import sys

import pytest

from mmtard.distributed.processes import raise_descriptor_limit

# A thread that is inside torch when the interpreter is taken down aborts the process nearly every time.
THREAD = """
import atexit, sys, threading, torch
from mmtard.distributed.processes import exit_process
atexit.register(print, "cleaned up")
started = threading.Event()
def work():
    started.set()
    while True:
        torch.ones(100) + 1
threading.Thread(target=work, daemon=True).start()
started.wait()
sys.stdout.write("the last line, ")
exit_process({status})
"""


@pytest.mark.parametrize("status", (0, 3))
def test_a_thread_within_torch_does_not_change_how_the_process_ends(status):
    ended = subprocess.run(
        [sys.executable, "-c", THREAD.format(status=status)], capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (status, "the last line, cleaned up\n", "")


def test_output_that_could_not_be_written_is_a_failure():
    with open("/dev/full", "w") as full:
        buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        ended = subprocess.run(
            [sys.executable, "-c", "from mmtard.distributed.processes import exit_process; print(1); exit_process(0)"],
            stdout=full,
            env=buffered,
            timeout=60,
        )
    assert ended.returncode == 120


def test_the_limit_of_open_files_is_raised_as_far_as_it_may_be():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        assert raise_descriptor_limit(300) == 300 == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        assert raise_descriptor_limit(200) == 300  # and is never lowered
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
