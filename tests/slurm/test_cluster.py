"""Real jobs over two Slurm nodes."""

import json
import sys

import pytest

from mmtard.runs.metrics import TIMINGS

from .conftest import LONG, ROOT, STEPS

pytestmark = pytest.mark.slow


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(run):
    """metrics.jsonl without the times."""
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows(run / "metrics.jsonl")]


def test_the_script_trains_over_two_nodes_to_the_end(cluster, undisturbed):
    run, job, fields = undisturbed
    log = cluster.log(job)
    assert fields["JobState"] == "COMPLETED", log
    assert fields["NodeList"] == "node[1-2]" and fields["Restarts"] == "0"
    assert [row["step"] for row in rows(run / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert (run / "checkpoints" / "latest").resolve().name == f"step-{STEPS}"
    (start,) = rows(run / "resume.jsonl")
    assert (start["step"], start["world_size"], start["job"], start["end"]["kind"]) == (0, 2, job, "complete")
    assert "start 1 on node[1-2], ranks meet at 127.0.0.1:" in log
    assert f"0: step {STEPS}/{STEPS}" in log  # an override reached the training: a line every step


def test_srun_alone_trains_the_same_as_the_script(cluster, tiny, undisturbed):
    config, run = tiny("srun", **LONG)
    cluster.run(
        "srun",
        "--nodes=2",
        "--ntasks-per-node=1",
        "python",
        "-m",
        "mmtard",
        "train",
        config,
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="9990",
    )
    assert [start["world_size"] for start in rows(run / "resume.jsonl")] == [2]
    assert losses(run) == losses(undisturbed[0])


def test_a_wrong_setting_ends_the_job_before_any_rank_starts(cluster, tiny):
    config, run = tiny("wrong")
    job = cluster.submit("train.stepz=3", MMTARD_CONFIG=str(config))
    fields = cluster.ended(job)
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "2:0", "0")
    assert cluster.log(job).count("unknown key 'train.stepz'; did you mean 'train.steps'?") == 1
    assert not run.exists()


FAILS = """
import os, pathlib, signal, sys, time
sys.path.insert(0, {root!r})
from mmtard import config
from mmtard.runs import history
run = pathlib.Path(config.load(sys.argv[1]).run_dir)
if os.environ["SLURM_PROCID"] == "0":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    run.mkdir(parents=True, exist_ok=True)
    history.record_start(run, {{"step": 0}})
    time.sleep(100)
while not history.read(run)[-1:] or history.read(run)[-1].get("end"):
    time.sleep(0.1)
history.record_end(run, history.FAILED, "rank 1: out of memory", 0)
raise SystemExit(1)
"""


def test_a_rank_that_failed_is_not_started_again_though_slurm_had_to_kill_the_one_that_waited_for_it(
    cluster, tiny, tmp_path
):
    """As NCCL waits: heedless of signals. Slurm then reports a killed rank, which alone would be a reason to go on."""
    config, run = tiny("fails")
    (tmp_path / "fails.py").write_text(FAILS.format(root=str(ROOT)))
    (tmp_path / "python").write_text(
        f'#!/bin/sh\n[ "$3" != train ] || exec {sys.executable} {tmp_path}/fails.py "$4"\nexec {sys.executable} "$@"\n'
    )
    (tmp_path / "python").chmod(0o755)
    job = cluster.submit(config, PATH=f"{tmp_path}:{cluster.env['PATH']}")
    fields = cluster.ended(job)
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "137:0", "0"), cluster.log(job)
    assert "this start ended as failed: rank 1: out of memory; it is not repeated by itself" in cluster.log(job)
    assert len(rows(run / "resume.jsonl")) == 1


def test_a_rank_that_failed_while_the_others_started_is_not_started_again(cluster, tiny, tmp_path):
    """Slurm ends the others by SIGTERM, as a warning to ranks that do not listen yet would."""
    config, run = tiny("fails_early")
    (tmp_path / "python").write_text(
        f'#!/bin/sh\n[ "$3" != train ] || [ $SLURM_PROCID = 0 ] || exec sleep 60\n'
        f'[ "$3" != train ] || exit 3\nexec {sys.executable} "$@"\n'
    )
    (tmp_path / "python").chmod(0o755)
    job = cluster.submit(config, PATH=f"{tmp_path}:{cluster.env['PATH']}")
    fields = cluster.ended(job)
    assert (fields["JobState"], fields["Restarts"]) == ("FAILED", "0"), cluster.log(job)
    assert "this start ended before the run's folder was prepared" in cluster.log(job) and not run.exists()
