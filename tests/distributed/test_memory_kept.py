"""What is freed is kept for the next tensor of its size."""

import subprocess
import sys

import pytest

CODE = """
import resource, torch
from mmtard.distributed.processes import keep_freed_memory
if {kept} and not keep_freed_memory():
    print(-1)
    raise SystemExit
def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):  # malloc takes some to find its places
    torch.ones(2**24)  # 64 MiB
before = pages()
for _ in range(4):
    torch.ones(2**24)
print(pages() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's count of pages is read")
def test_memory_that_is_kept_is_not_cleared_anew():
    def faults(kept):
        command = [sys.executable, "-c", CODE.format(kept=kept)]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    kept = faults(True)
    if kept < 0:
        pytest.skip("this C library has no mallopt")
    assert kept < 1000 < faults(False)  # 64 MiB are 16,384 pages
