"""The environment that the README's commands make, with a stand-in for Python: when it is made, when left alone."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "environment.sh"
PYTHON = r"""#!/bin/sh
echo "$@" >>calls
case "$*" in
    "-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
esac
"""


@pytest.fixture
def install(tmp_path):
    """Call with extras: what Python was asked to do for them beyond looking at itself."""
    for name in ("setup.cfg", "constraints.txt"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1, 1))
    shutil.copy(SCRIPT, tmp_path)
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)

    def call(extras):
        (tmp_path / "calls").write_text("")
        words = ["bash", "-euc", f". ./environment.sh; environment '{extras}'"]
        subprocess.run(
            words,
            cwd=tmp_path,
            env=os.environ | {"PYTHON": str(tmp_path / "python")},
            check=True,
            capture_output=True,
            timeout=60,
        )
        return [line for line in (tmp_path / "calls").read_text().splitlines() if line.startswith("-m ")]

    return call


MADE = "-m venv --clear .venv"


def installed(extras):
    return f"-m pip install --quiet --disable-pip-version-check -c constraints.txt -e .{extras}"


def test_an_environment_that_works_is_added_to_and_never_made_over(install, tmp_path):
    """By a shell whose python3 is another: its library and the old interpreter would not fit."""
    assert install("") == [MADE, installed("")]
    assert install("") == []
    assert install("[test]") == [installed("[test]")]
    os.utime(tmp_path / "setup.cfg", (2**31, 2**31))
    assert install("") == [installed("")]


def test_an_environment_that_is_broken_is_made_anew(install, tmp_path):
    install("")
    (tmp_path / ".venv" / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
    assert install("") == [MADE, installed("")]


def test_asking_for_help_installs_nothing(tmp_path):
    (tmp_path / "launch").mkdir()
    for name in ("environment.sh", "quickstart.sh"):
        shutil.copy(SCRIPT.with_name(name), tmp_path / "launch")
    for words, status in ((["--help"], 0), (["please"], 2)):
        done = subprocess.run(
            ["bash", tmp_path / "launch" / "quickstart.sh", *words],
            env=os.environ | {"PYTHON": "false"}, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == status and "It takes no arguments" in done.stdout
    assert not (tmp_path / ".venv").exists()
