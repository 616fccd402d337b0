"""`mmtard train` under a single process, torchrun, the deepspeed launcher and srun's variables: the same losses."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def run(command, **env):
    clean = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    }
    added = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.Popen(
        list(map(str, command)), env=clean | added | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(*processes):
    for p in processes:
        printed, _ = p.communicate(timeout=300)
        assert p.returncode == 0, printed


@pytest.fixture(scope="module")
def configs(job):
    train = {"steps": 3, "batch_size": 16, "lr": 1e-3}
    return {name: job(f"launched-{name}", train=train) for name in ("single", "torchrun", "deepspeed", "srun")}


def test_every_launcher_trains_the_same(configs, train_here):
    command = ("-m", "mmtard", "train")
    assert train_here(configs["single"][0]) == 0
    finish(run([BIN / "torchrun", "--standalone", "--nproc_per_node", 2, *command, configs["torchrun"][0]]))
    here = ("--num_accelerators", 2, "--master_addr", "127.0.0.1", "--master_port", free_port())
    finish(run([BIN / "deepspeed", *here, "--module", "mmtard", "train", configs["deepspeed"][0]]))
    port = str(free_port())
    slurm = [
        {
            "SLURM_STEP_ID": "0",
            "SLURM_PROCID": str(r),
            "SLURM_LOCALID": str(r),
            "SLURM_NTASKS": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        for r in (0, 1)
    ]
    finish(*(run([sys.executable, *command, configs["srun"][0]], **variables) for variables in slurm))

    expected = losses(configs["single"][1])
    assert len(expected) == 3
    for name in ("torchrun", "deepspeed", "srun"):
        assert losses(configs[name][1]) == pytest.approx(expected, rel=1e-4), name
        history = json.loads((configs[name][1] / "resume.jsonl").read_text())
        assert history["world_size"] == 2
