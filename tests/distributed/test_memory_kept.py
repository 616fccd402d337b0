"""What is freed is kept for the next tensor of its size."""

import subprocess
import sys

import pytest

CODE = """
import os, resource, torch
from mmtard.distributed.processes import keep_freed_memory
if {kept} and not keep_freed_memory():
    print(-1, -1)
    raise SystemExit
def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 2**20
for _ in range(20):  # malloc takes some to find its places
    torch.ones(2**24)  # 64 MiB
before = pages()
for _ in range(4):
    torch.ones(2**24)
faults, held = pages() - before, resident()
{kept} and keep_freed_memory()
print(faults, held - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's count of pages is read")
def test_memory_that_is_kept_is_not_cleared_anew_and_goes_back_before_the_next_run():
    def found(kept):
        command = [sys.executable, "-c", CODE.format(kept=kept)]
        return map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())

    faults, returned = found(True)
    if faults < 0:
        pytest.skip("this C library has no mallopt")
    assert faults < 1000 < next(found(False))  # 64 MiB are 16,384 pages
    assert returned >= 64
