"""The script that runs tests and benchmarks on a GPU answers a wrong command line before anything runs."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def check(*words, **env):
    script = ["bash", ROOT / "launch" / "gpu_check.sh", *map(str, words)]
    return subprocess.run(script, capture_output=True, text=True, timeout=60, env=os.environ | env)


@pytest.mark.parametrize(
    "words, told",
    [
        (
            ["--fast"],
            "'--fast' is no option; it takes --rehearse, --tests, --benchmarks, --wheels DIR and a results folder",
        ),
        (["--wheels"], "--wheels needs a folder"),
        (["--wheels", "/nowhere"], "--wheels: '/nowhere' has no wheels"),
    ],
)
def test_a_wrong_command_line_is_one_line(words, told):
    done = check(*words)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"gpu_check.sh: {told}\n")


def test_a_python_without_torch_is_told_with_the_way_out(tmp_path):
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\nexit 1\n")
    bare.chmod(0o755)
    done = check(tmp_path / "out", PYTHON=str(bare))
    assert done.returncode == 2 and f"'{bare}' has no torch; set PYTHON to one that has" in done.stderr
