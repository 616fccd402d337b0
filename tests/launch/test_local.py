"""The ranks that `--local` starts end with the launcher that started them, also where it is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAUNCHER = (
    "import sys; from pathlib import Path; from mmtard.launch import local; local.run(sys.argv[1], (), Path('.'), 2)"
)


def test_ranks_of_a_launcher_that_is_killed_are_told_to_save_and_end(tmp_path):
    rank = tmp_path / "rank"  # in the place of Python: says that it runs, and what ends it
    rank.write_text(f"""#!/bin/bash
trap 'touch {tmp_path}/told-$RANK; exit 75' TERM
touch {tmp_path}/runs-$RANK
while true; do sleep 0.05; done
""")
    rank.chmod(0o755)
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, rank], env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path
    )
    until(lambda: len(list(tmp_path.glob("runs-*"))) == 2)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    until(lambda: len(list(tmp_path.glob("told-*"))) == 2)


def until(condition, limit=20.0):
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
