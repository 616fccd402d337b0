"""The first rank makes something for longer than the group's operations may take."""

import pytest

from .launch import run_ranks

pytestmark = pytest.mark.slow
SCRIPT = """
import time
from datetime import timedelta
from mmtard.distributed import ranks as process_ranks
from mmtard.distributed.processes import exit_process
ranks = process_ranks.start("cpu", timeout=timedelta(seconds=2))
made = ranks.run_on_first(lambda: time.sleep(4) or "an index", patience=timedelta(minutes=2))
assert made == "an index" and ranks.all_gather(ranks.rank) == [0, 1]
process_ranks.stop()
exit_process(0)
"""


def test_the_others_wait_for_as_long_as_they_are_told_to(tmp_path):
    run_ranks(["-c", SCRIPT], 2, tmp_path, "ranks")
