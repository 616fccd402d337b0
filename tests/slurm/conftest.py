"""A throwaway Slurm cluster of six nodes, tiny shards and a tiny configuration for real jobs."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from processes import python_path, without_extras

ROOT = Path(__file__).parents[2]
LOCAL_CLUSTER, TRAIN = ROOT / "slurm" / "local_cluster.sh", ROOT / "slurm" / "train_vitb32.sh"
TERMINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


class Cluster:
    """What a user of the cluster does: submit, wait, read the log."""

    def __init__(self, folder: Path):
        self.folder = folder
        python = Path(sys.executable).parent
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "MMTARD_"))}
        self.env |= {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{python}:{os.environ['PATH']}",
            "PYTHONPATH": python_path(without_extras(folder)),
            "OMP_NUM_THREADS": "1",
        }

    def run(self, *command, **env) -> str:
        """A command's output; it must succeed."""
        done = subprocess.run(
            [str(c) for c in command], env=self.env | env, cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *words, options=(), script=TRAIN, **env) -> str:
        """sbatch of the training script (or another), shrunk to two nodes of one task; the job's id."""
        small = (
            "--account=any",
            "--partition=debug",
            "--oversubscribe",
            "--nodes=2",
            "--gpus-per-node=1",
            "--ntasks-per-node=1",
            "--cpus-per-task=1",
        )
        return self.run(
            "sbatch", "--parsable", *small, f"--output={self.folder}/%x-%j.log", *options, script, *words, **env
        ).strip()

    def job(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", "--oneliner", job)))

    def ended(self, job: str, limit: float = 240) -> dict[str, str]:
        """Wait for the job's end; its fields then."""
        end = time.monotonic() + limit
        while time.monotonic() < end:
            fields = self.job(job)
            if fields["JobState"] in TERMINAL:
                return fields
            time.sleep(0.5)
        raise AssertionError(f"job {job} has not ended after {limit:.0f} s: {fields}\n{self.log(job)}")

    def log(self, job: str) -> str:
        found = list(self.folder.glob(f"*-{job}.log"))
        return found[0].read_text() if found else ""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    if os.geteuid() != 0:
        pytest.skip("needs root: slurmd starts jobs as their owners")
    absent = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]
    if absent:
        pytest.skip(f"needs Slurm, {' and '.join(absent)} missing: apt-get install --no-install-recommends slurm-wlm")
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    cluster.run(LOCAL_CLUSTER, "up", cluster.folder, "--nodes", 6)
    yield cluster
    cluster.run(LOCAL_CLUSTER, "down", cluster.folder)


STEPS = 24
LONG = {
    "train": {"steps": STEPS},
    "attack": {"steps": 24},
    "checkpoint": {"every": 2},
}  # long enough to be met at its work


@pytest.fixture(scope="session")
def undisturbed(cluster, tiny):
    """The run of a job of the training script that came to its end; the job's id and fields."""
    config, run = tiny("undisturbed", **LONG)
    job = cluster.submit(config, "log.every=1")
    return run, job, cluster.ended(job)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Call with a name: a configuration of six TeCoA steps and its run folder. Other arguments change its sections."""
    from mmtard.config import Data
    from mmtard.data.dataset import open_dataset
    from mmtard.examples.shapes import make_data

    folder = tmp_path_factory.mktemp("tiny")
    shards = make_data(folder / "data", train=200, test=40, zeroshot=40) / "train"
    open_dataset(Data(shards=str(shards)))  # builds the index before two runs could at once

    def make(name: str, **changes) -> tuple[Path, Path]:
        run, path = folder / "runs" / name, folder / f"{name}.yaml"
        content = {
            "run_dir": str(run),
            "student": {"arch": str(ROOT / "mmtard" / "examples" / "tiny_clip.json"), "weights": "random"},
            "method": {"name": "tecoa"},
            "attack": {"steps": 2},
            "data": {"shards": str(shards), "lanes": 4, "window": 16, "workers": 1},
            "train": {"steps": 6, "batch_size": 16, "lr": 1e-3},
            "engine": {"device": "cpu", "precision": "float32"},
            "log": {"tensorboard": False},
        }
        for section, settings in changes.items():
            content[section] = {**content.get(section, {}), **settings}
        path.write_text(yaml.safe_dump(content))
        return path, run

    return make
