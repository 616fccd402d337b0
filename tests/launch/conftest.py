"""`launch/submit.py` called as a user of a login node does, where importing torch fails."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from slurm.conftest import cluster, tiny  # noqa: F401  the throwaway Slurm and its tiny runs

ROOT = Path(__file__).parents[2]
SUBMIT = ROOT / "launch" / "submit.py"
sys.path.insert(0, str(ROOT))


@pytest.fixture
def submit(tmp_path, tree, write, warm_python):
    """Call with arguments: `submit.py --config run.yaml` in tmp_path, without a Slurm, where importing torch fails."""
    write(tree)
    (tmp_path / "bin").mkdir()
    for package in ("torch", "open_clip", "deepspeed", "numpy"):
        (tmp_path / "poison" / package).mkdir(parents=True)
        (tmp_path / "poison" / package / "__init__.py").write_text(f"raise RuntimeError('{package} was imported')")

    def call(*args, config="run.yaml", **env):
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        env = {**clean, "PATH": str(tmp_path / "bin"), "PYTHONPATH": str(tmp_path / "poison"), **env}
        command = [warm_python, SUBMIT, "--config", config, *args]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)

    return call


@pytest.fixture
def plain(tmp_path):
    """The text with this test's folder, the time and the Python replaced by FOLDER, TIME and PYTHON."""

    def make(text):
        text = (
            text.replace(str(tmp_path), "FOLDER")
            .replace(sys.executable, "PYTHON")
            .replace(str(tmp_path).strip("/").replace("/", "_"), "FOLDER")
        )
        return re.sub(r"\d{8}-\d{6}(-\d+)?", "TIME", text)

    return make
