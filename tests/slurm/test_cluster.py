"""Real jobs over two Slurm nodes."""

import json
import sys
import time

import pytest

pytestmark = pytest.mark.slow


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(run):
    """metrics.jsonl without the times."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_s")} for row in rows(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def submitted(cluster, tiny):
    """A job of the training script that came to its end: its id, its fields, its run folder."""
    config, run = tiny("submitted")
    job = cluster.submit(config, "log.every=1")
    return job, cluster.ended(job), run


def test_the_script_trains_over_two_nodes_to_the_end(cluster, submitted):
    job, fields, run = submitted
    log = cluster.log(job)
    assert fields["JobState"] == "COMPLETED", log
    assert fields["NodeList"] == "node[1-2]" and fields["Restarts"] == "0"
    assert [row["step"] for row in rows(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert (run / "checkpoints" / "latest").resolve().name == "step-6"
    assert [(start["step"], start["world_size"]) for start in rows(run / "resume.jsonl")] == [(0, 2)]
    assert "start 1 on node[1-2], ranks meet at 127.0.0.1:" in log
    assert "0: step 6/6" in log  # an override reached the training: a line every step


def test_srun_and_torchrun_train_the_same_as_the_script(cluster, tiny, submitted):
    config, by_srun = tiny("srun")
    cluster.run("srun", "--nodes=2", "--ntasks-per-node=1", "python", "-m", "mmtard", "train", config, MASTER_ADDR="127.0.0.1", MASTER_PORT="9990")
    config, by_torchrun = tiny("torchrun")
    cluster.run(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "mmtard", "train", config)
    assert [start["world_size"] for run in (by_srun, by_torchrun) for start in rows(run / "resume.jsonl")] == [2, 2]
    assert losses(by_srun) == losses(by_torchrun) == losses(submitted[2])


def test_a_run_told_to_stop_goes_back_to_the_queue_once_and_ends_as_one_undisturbed(cluster, tiny, submitted):
    config, run = tiny("stopped")
    job = cluster.submit(config, "log.every=1")
    while not (run / "start").exists():  # it is written when every rank listens, and before the first step
        assert cluster.job(job)["JobState"] in ("PENDING", "RUNNING"), cluster.log(job)
        time.sleep(0.1)
    cluster.run("scancel", "--signal=USR2", job)
    fields = cluster.ended(job)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), cluster.log(job)
    first, second = rows(run / "resume.jsonl")
    assert first["step"] == 0 and 0 < second["step"] < 6
    assert losses(run) == losses(submitted[2])


def test_a_wrong_setting_ends_the_job_before_any_rank_starts(cluster, tiny):
    config, run = tiny("wrong")
    job = cluster.submit("train.stepz=3", MMTARD_CONFIG=str(config))
    fields = cluster.ended(job)
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "2:0", "0")
    assert cluster.log(job).count("unknown key 'train.stepz'; did you mean 'train.steps'?") == 1
    assert not run.exists()
