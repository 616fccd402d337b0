"""Whatever a cluster does to a job, its run ends as one that nobody disturbed, or ends for good with a reason."""

import json
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest

from mmtard import history, runs

from .conftest import LONG, ROOT
from .test_cluster import losses, rows

pytestmark = pytest.mark.slow
WORDS = ("log.every=1",)


def until(condition, cluster, job, limit=120.0, pause=0.05):
    """Wait for a moment in the life of a job that has not ended."""
    end, looked = time.monotonic() + limit, 0.0
    while not condition():
        if time.monotonic() > looked + 2:
            looked = time.monotonic()
            assert cluster.job(job)["JobState"] in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED"), cluster.log(job)
        assert looked < end, cluster.log(job)
        time.sleep(pause)


def begun(run, start, more):
    """Whether a run's start number `start` (1 is the first) has done `more` steps."""
    starts, path = history.read(run), run / "metrics.jsonl"
    return len(starts) == start and path.exists() and len(path.read_text().splitlines()) >= starts[-1]["step"] + more


def process(run, rank):
    return json.loads((run / ".heartbeat" / f"rank-{rank}.json").read_text())["pid"]


def state(run):
    """What `mmtard runs` says of a run."""
    (row,) = runs.find(run)
    return row.state


@pytest.fixture(scope="module")
def limited(cluster, tiny):
    """A job whose time is up before its work is done, since its only shard takes half a minute to come; it runs beside the others."""
    config, run = tiny("limited", **LONG)
    (shard,) = (run.parents[1] / "data" / "train").glob("*.tar")
    data = [f"data.shards=pipe:sleep 35; cat {shard}", f"data.index={shard.with_name('mmtard-index.npz')}"]
    data += [f"data.classnames={shard.with_name('classnames.txt')}", f"data.cache.dir={run.parents[1] / 'cache'}"]
    return cluster.submit(config, *data, *WORDS, options=("--time=1", "--signal=USR2@20")), run


@pytest.fixture(scope="module")
def evaluated(cluster, undisturbed):
    """A job that measures a run and was told to stop while it did."""
    run = undisturbed[0]
    words = (run, run.parents[1] / "data" / "test", "--", "--iters", "500", "--batch-size", "2", "--device", "cpu")
    job = cluster.submit(*words, options=("--array=0",), script=ROOT / "slurm" / "evaluate.sh")
    until(lambda: len(measuring(run)) == 2, cluster, job)
    os.kill(measuring(run)[0], signal.SIGUSR2)  # straight to a rank: scancel may take longer than the rest of the evaluation
    return job


def measuring(run):
    """The ranks that evaluate a run and have started their loaders."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            # srun has these words after its own; a loader has its rank's, and no children.
            if words[1:4] == [b"-m", b"mmtard", b"evaluate"] and str(run).encode() in words and (path / "task" / path.name / "children").read_text():
                found.append(int(path.name))
        except OSError:
            pass  # it ended meanwhile
    return found


def test_whatever_is_done_to_a_job_its_run_loses_no_checkpoint_and_ends_undisturbed(cluster, tiny, limited, undisturbed, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
    config, run = tiny("disturbed", **LONG)
    job = cluster.submit(config, *WORDS)
    writing = run / "checkpoints"
    disturbances = [
        (lambda: begun(run, 1, 2), lambda: cluster.run("scontrol", "requeue", job)),
        (lambda: begun(run, 2, 2), lambda: cluster.run("scancel", "--signal=TERM", job)),
        (lambda: begun(run, 3, 3), lambda: os.kill(process(run, 1), signal.SIGKILL)),
        # Straight to a rank: scancel takes longer than the checkpoint.
        (lambda: begun(run, 4, 1) and any(writing.glob(".writing-*")), lambda: os.kill(process(run, 0), signal.SIGUSR2)),
    ]
    published = []
    for start, (moment, disturb) in enumerate(disturbances, 1):
        until(lambda: begun(run, start, 1), cluster, job)
        until(moment, cluster, job, pause=0.0005)
        assert state(run) == "running"
        if start != 4:
            time.sleep(random.uniform(0, 0.8))
        published.append(history.newest_step(run))
        disturb()
    fields = cluster.ended(job)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "4"), cluster.log(job)
    starts = history.read(run)
    assert [(s["job"], s["restart"]) for s in starts] == [(job, n) for n in range(5)]
    assert all(s["step"] >= step for s, step in zip(starts[1:], published)), (starts, published)
    assert [history.kind(s) for s in starts[1:]] == [history.PREEMPTED, history.LOST, history.PREEMPTED, history.COMPLETE]
    assert history.kind(starts[0]) in (history.PREEMPTED, history.LOST)  # Slurm may not have left it the time to save
    assert all(s["end"]["time"] <= later["time"] for s, later in zip(starts, starts[1:]) if s.get("end"))
    assert "lost rank 1 (" in starts[2]["end"]["reason"] and starts[2]["end"]["reason"] in cluster.log(job)
    assert losses(run) == losses(undisturbed[0])
    assert state(run) == "complete"


def test_a_hang_ends_the_job_within_the_limit_and_past_its_bound_for_good(cluster, tiny, evaluated):
    config, run = tiny("hung", **LONG, resume={"watchdog_minutes": 0.1, "max_losses": 0})
    job = cluster.submit(config, *WORDS)
    until(lambda: begun(run, 1, 2), cluster, job)
    os.kill(process(run, 1), signal.SIGSTOP)
    began = time.monotonic()
    fields = cluster.ended(job)
    assert time.monotonic() - began < 6 + 20  # the limit, and what Slurm takes to end a stopped process
    assert (fields["JobState"], fields["Restarts"]) == ("FAILED", "0"), cluster.log(job)
    assert "no progress in its" in cluster.log(job) and "rank 1 (" in cluster.log(job) and "did not arrive" in cluster.log(job)
    assert "resume.max_losses allows 0, raise it to go on" in cluster.log(job)
    assert state(run).startswith("failed: 1 starts ended as lost")


def test_forbidden_requeue_a_bound_and_another_number_of_nodes(cluster, tiny, undisturbed):
    config, run = tiny("moved", **LONG, resume={"max_preemptions": 1})
    first = cluster.submit(config, *WORDS, options=("--no-requeue",))
    until(lambda: begun(run, 1, 2), cluster, first)
    cluster.run("scancel", "--signal=TERM", first)
    assert cluster.ended(first)["ExitCode"] == "75:0", cluster.log(first)
    (second,) = re.findall(r"may not be requeued; submitted again as job (\d+)", cluster.log(first))
    until(lambda: begun(run, 2, 2), cluster, second)
    cluster.run("scancel", "--signal=USR2", second)
    fields, log = cluster.ended(second), cluster.log(first)  # the second job goes on in the first one's log
    assert (fields["ExitCode"], fields["Requeue"], fields["NumNodes"]) == ("1:0", "0", "2"), log
    assert "2 starts ended as preempted" in log and "resume.max_preemptions allows 1, raise it to go on" in log
    assert log.count("submitted again") == 1

    third = cluster.submit(config, *WORDS, "resume.max_preemptions=2", options=("--nodes=1",))
    assert cluster.ended(third)["JobState"] == "COMPLETED", cluster.log(third)
    starts = history.read(run)
    assert [(s["job"], s["world_size"]) for s in starts] == [(first, 2), (second, 2), (third, 1)]
    assert [s["step"] for s in starts[1:]] == [s["end"]["step"] for s in starts[:-1]]
    ours, theirs = losses(run), losses(undisturbed[0])
    assert [row["batch"] for row in ours] == [row["batch"] for row in theirs]
    # One rank sums a batch in another order than two, and forty attack steps make more of the last bits.
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=1e-3)


def test_preflight_passes_over_two_nodes(cluster, tiny):
    config, _ = tiny("preflight")
    job = cluster.submit(config, script=ROOT / "slurm" / "preflight.sh")
    fields = cluster.ended(job)
    log = cluster.log(job)
    verdicts = [line.split()[1:3] for line in log.splitlines() if " PASS " in line or " FAIL " in line]
    assert fields["JobState"] == "COMPLETED", log
    assert verdicts == [["PASS", f"{name}:"] for name in ("versions", "devices", "network", "models", "folder", "shards")]


def test_a_time_limit_shorter_than_the_work_only_interrupts_it(cluster, limited, undisturbed):
    job, run = limited
    fields = cluster.ended(job)
    assert fields["JobState"] == "COMPLETED" and int(fields["Restarts"]) >= 1, cluster.log(job)
    *stopped, last = history.read(run)
    assert [history.kind(s) for s in stopped] == [history.TIMEOUT] * int(fields["Restarts"]) and history.kind(last) == history.COMPLETE
    assert stopped[0]["end"]["reason"].startswith("stopped by SIGUSR2 after step ")
    assert losses(run) == losses(undisturbed[0])


def test_an_interrupted_evaluation_goes_on_and_leaves_one_result(cluster, undisturbed, evaluated):
    fields, log = cluster.ended(evaluated), cluster.log(evaluated)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), log
    assert log.count("what is measured is kept in") == 2 and "stopped by SIGUSR2" in log
    (result,) = (undisturbed[0] / "evaluations").iterdir()
    (dataset,) = json.loads((result / "results.json").read_text())["datasets"]
    assert dataset["clean"]["n"] == 40 and not (result / "partial").exists()
