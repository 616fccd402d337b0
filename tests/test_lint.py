"""The repository is formatted, without lint, and typed where others call it: what CI asks for, as tests."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def needs(tool):
    return pytest.mark.skipif(importlib.util.find_spec(tool) is None, reason=f"needs {tool}: pip install {tool}")


def run(*words):
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


@needs("ruff")
@pytest.mark.parametrize("words", [("check",), ("format", "--check")], ids="-".join)
def test_ruff_finds_nothing(words):
    run("ruff", *words, "--quiet")


@pytest.mark.slow
@needs("mypy")
def test_the_public_surface_is_typed():
    run("mypy")
