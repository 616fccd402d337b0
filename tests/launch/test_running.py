"""Submitted work that really trains: on this machine, and over two nodes of a throwaway Slurm."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmtard.metrics import TIMINGS

SUBMIT = Path(__file__).parents[2] / "launch" / "submit.py"
TWO_NODES = ("--nodes=2", "--gpus-per-node=1", "--cpus-per-task=1", "log.every=1")
pytestmark = pytest.mark.slow


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(run):
    """metrics.jsonl without the times."""
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows(run / "metrics.jsonl")]


def jobs(run):
    """The folder of the logs and results of the run's one submission."""
    (folder,) = (run / "submissions").iterdir()
    return folder / "jobs"


def test_local_trains_here_on_two_ranks_with_the_copied_code(tiny):
    config, run = tiny("local")
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, SUBMIT, "--config", config, "--local", "--gpus-per-node=2", "log.every=1"]
    done = subprocess.run(command, env=env, cwd=config.parent, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "2 processes here" in done.stdout and "step 6/6" in done.stdout
    assert [row["step"] for row in rows(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert rows(run / "resume.jsonl")[0]["world_size"] == 2
    assert json.loads((run / "environment.json").read_text())["command"].startswith(f"{jobs(run).parent}/code/mmtard/")
    again = subprocess.run(command, env=env, cwd=config.parent, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0 and again.stdout.endswith("# nothing is left to do\n")


@pytest.fixture(scope="module")
def undisturbed(cluster, tiny):
    """A followed job over two nodes that came to its end: (what was printed, its run folder)."""
    config, run = tiny("followed")
    return cluster.run(sys.executable, SUBMIT, "--config", config, *TWO_NODES, "--follow"), run


def test_a_submitted_job_trains_over_two_nodes_to_the_end(undisturbed):
    printed, run = undisturbed
    job = re.search(r"job (\d+): training", printed)[1]
    assert "step 6/6" in printed and printed.endswith(f"-- job {job} (followed) is COMPLETED\n")
    assert [row["step"] for row in rows(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert (run / "checkpoints" / "latest").resolve().name == "step-6"
    assert [(start["step"], start["world_size"]) for start in rows(run / "resume.jsonl")] == [(0, 2)]
    for rank in (0, 1):
        assert pickle.loads((jobs(run) / f"{job}_{rank}_result.pkl").read_bytes()) == ("success", 0)
    assert json.loads((run / "environment.json").read_text())["command"].startswith(f"{jobs(run).parent}/code/mmtard/")


def disturb(cluster, config, run, how):
    """Submit, disturb the job by `how(job)` once it trains; its fields at the end."""
    job = re.search(r"job (\d+): training", cluster.run(sys.executable, SUBMIT, "--config", config, *TWO_NODES))[1]
    log = jobs(run) / f"{job}_0_log.out"
    while not (run / "start").exists():
        assert cluster.job(job)["JobState"] in ("PENDING", "RUNNING"), log.read_text()
        time.sleep(0.1)
    how(job)
    return cluster.ended(job), job


def test_a_job_told_to_stop_is_requeued_once_and_ends_as_one_undisturbed(cluster, tiny, undisturbed):
    config, run = tiny("told")
    fields, job = disturb(cluster, config, run, lambda job: cluster.run("scancel", "--signal=USR2", job))
    log = (jobs(run) / f"{job}_0_log.out").read_text()
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), log
    first, second = rows(run / "resume.jsonl")
    assert first["step"] == 0 and 0 < second["step"] < 6
    assert losses(run) == losses(undisturbed[1])
    assert log.count(f"job {job} goes back to the queue") == 1
    assert pickle.loads((jobs(run) / f"{job}_0_result.pkl").read_bytes()) == ("success", 0)


def test_a_killed_rank_costs_no_more_than_a_restart(cluster, tiny, undisturbed):
    config, run = tiny("bereft")

    def kill(_):
        (rank_1,) = (p for p in trainings(run) if b"SLURM_PROCID=1" in (p / "environ").read_bytes().split(b"\0"))
        os.kill(int(rank_1.name), signal.SIGKILL)

    fields, job = disturb(cluster, config, run, kill)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), (jobs(run) / f"{job}_0_log.out").read_text()
    assert losses(run) == losses(undisturbed[1])


def trainings(run):
    """The processes of mmtard that train this run, without their loader processes."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            parent = re.search(r"PPid:\s+(\d+)", (path / "status").read_text())[1]
            by_submitit = b"submitit.core._submit" in (Path("/proc") / parent / "cmdline").read_bytes().split(b"\0")
        except (OSError, TypeError):
            continue
        if by_submitit and words[1:4] == [b"-m", b"mmtard", b"train"] and os.fsencode(run) in words[4]:
            yield path
