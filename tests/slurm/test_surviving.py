"""Whatever a cluster does to a job, its run ends as one that nobody disturbed, or ends for good with a reason."""

import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mmtard.runs import history, table

from .conftest import LOCAL_CLUSTER, LONG, ROOT
from .test_cluster import losses

pytestmark = pytest.mark.slow
WORDS = ("log.every=1",)
LOSES_A_RANK = 4  # which start of the disturbed job


def until(condition, cluster, job, limit=120.0, pause=0.05):
    """Wait for a moment in the life of a job that has not ended."""
    end, looked = time.monotonic() + limit, 0.0
    while not condition():
        if time.monotonic() > looked + 2:
            looked = time.monotonic()
            assert cluster.job(job)["JobState"] in ("PENDING", "RUNNING", "SIGNALING", "COMPLETING", "REQUEUED"), (
                cluster.log(job)
            )
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
    (row,) = table.find_runs(run)
    return row.state


@pytest.fixture(scope="module", autouse=True)
def jobs(cluster, tiny, undisturbed):
    """All of these jobs at once, since each mostly waits, on nodes of their own: name -> what became of it."""
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor() as lanes:
        patch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
        yield {
            story.__name__: lanes.submit(story, cluster, tiny, undisturbed[0])
            for story in (limited, disturbed, deserted, moved, evaluated, outlasted, unheard)
        }


def limited(cluster, tiny, _):
    """A job whose time is up before its work is done, since its only shard takes half a minute to come: (job, run)."""
    config, run = tiny("limited", **LONG)
    (shard,) = (run.parents[1] / "data" / "train").glob("*.tar")
    data = [f"data.shards=pipe:sleep 35; cat {shard}", f"data.index={shard.with_name('mmtard-index.npz')}"]
    data.append("data.allow_pipe=true")
    data += [f"data.classnames={shard.with_name('classnames.txt')}", f"data.cache.dir={run.parents[1] / 'cache'}"]
    job = cluster.submit(config, *data, *WORDS, options=("--time=2", "--signal=USR2@80", "--nodelist=node[3-4]"))
    until(lambda: begun(run, 1, 1) and cluster.job(job)["JobState"] == "PENDING", cluster, job, pause=0.5)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")  # once is enough
    cluster.ended(job)
    return job, run


def disturbed(cluster, tiny, _):
    """A job that is preempted, requeued, stopped, bereft of a rank, stopped as it saves, and whose GPU fails at last:
    (job, run, steps).
    """
    config, run = tiny("disturbed", **LONG)
    python = run.parent / "python"
    python.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("failing_gpu.py"), python / "sitecustomize.py")
    path = os.pathsep.join([str(python), str(ROOT), cluster.env["PYTHONPATH"]])
    fails = {"PYTHONPATH": path, "FAILING_GPU_RESTART": "5"}
    job = cluster.submit(config, *WORDS, options=("--nodelist=node[1-2]",), **fails)
    urgent = (
        "--partition=urgent",
        "--nodelist=node[1-2]",
        "--exclusive",
        "--account=any",
        f"--output={cluster.folder}/urgent.log",
        "--wrap=date",
    )
    writing = run / "checkpoints"
    disturbances = [
        (lambda: begun(run, 1, 2), lambda: cluster.run("sbatch", *urgent)),
        (lambda: begun(run, 2, 2), lambda: cluster.run("scontrol", "requeue", job)),
        (lambda: begun(run, 3, 2), lambda: cluster.run("scancel", "--signal=TERM", job)),
        (lambda: begun(run, 4, 3), lambda: os.kill(process(run, 1), signal.SIGKILL)),
        # Straight to a rank: scancel takes longer than the checkpoint.
        (
            lambda: begun(run, 5, 1) and any(writing.glob(".writing-*")),
            lambda: os.kill(process(run, 0), signal.SIGUSR2),
        ),
    ]
    published = []
    for start, (moment, disturb) in enumerate(disturbances, 1):
        until(lambda: begun(run, start, 1), cluster, job)
        until(moment, cluster, job, pause=0.0005)
        assert state(run) == "running"
        if start != 5:
            time.sleep(random.uniform(0, 0.5))
        published.append(history.newest_step(run))
        disturb()
        if start == LOSES_A_RANK:  # a minute at most, then it is in the queue again
            until(lambda: cluster.job(job)["JobState"] != "RUNNING", cluster, job, limit=60, pause=0.2)
    cluster.ended(job)
    return job, run, published


def deserted(cluster, tiny, _):
    """A job one of whose nodes is lost, with its daemon and the job's processes, until the job ended: (job, run)."""
    config, run = tiny("deserted", **LONG)
    job = cluster.submit(config, *WORDS, options=("--nodelist=node[5-6]",))
    until(lambda: begun(run, 1, 2) and history.newest_step(run), cluster, job)
    daemon = next(
        int(line.split()[0])
        for line in (cluster.folder / "daemons").read_text().splitlines()
        if line.endswith(" slurmd.node6")
    )
    for pid in (daemon, *of_node("node6")):
        os.kill(pid, signal.SIGKILL)
    until(lambda: cluster.job(job)["JobState"] == "PENDING", cluster, job, limit=60, pause=0.5)
    cluster.run(LOCAL_CLUSTER, "restore", cluster.folder)
    cluster.ended(job)
    return job, run


def of_node(node):
    """The processes of jobs on a node, and of what Slurm runs there to watch over them."""
    found, parents = set(), {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int(re.search(r"PPid:\s+(\d+)", (path / "status").read_text())[1])
            if f"SLURMD_NODENAME={node}".encode() in (path / "environ").read_bytes().split(b"\0"):
                found.add(int(path.name))
        except (OSError, TypeError):
            pass  # it ended meanwhile
    watchers = {parents[pid] for pid in found} - found
    return found | {pid for pid in watchers if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"slurmstepd")}


def moved(cluster, tiny, _):
    """A run whose job may not be requeued, whose next is stopped too often, then on one node: (jobs, run, waiting)."""
    config, run = tiny("moved", **LONG, resume={"max_preemptions": 1})
    first = cluster.submit(config, *WORDS, options=("--no-requeue", "--nodelist=node[3-4]"))
    waiting = cluster.run(
        "sbatch", "--parsable", f"--dependency=afterok:{first}", "--account=any", "--output=/dev/null", "--wrap=date"
    ).strip()
    until(lambda: begun(run, 1, 2), cluster, first)
    cluster.run("scancel", "--signal=TERM", first)
    assert cluster.ended(first)["ExitCode"] == "75:0", cluster.log(first)
    (second,) = re.findall(r"may not be requeued; submitted again as job (\d+)", cluster.log(first))
    handed = cluster.run("squeue", "--noheader", "--format=%E", "--jobs", waiting).strip()
    until(lambda: begun(run, 2, 2), cluster, second)
    cluster.run("scancel", "--signal=USR2", second)
    cluster.ended(second)
    third = cluster.submit(config, *WORDS, "resume.max_preemptions=2", options=("--nodes=1", "--nodelist=node3"))
    cluster.ended(third)
    return (first, second, third), run, (waiting, handed)


# A Python that takes long to start: one that trains says that it is there, and sleeps in the first two starts.
LATE = """
import os, pathlib, sys, time

if sys.orig_argv[1:4] == ["-m", "mmtard", "train"]:
    start = int(os.environ.get("SLURM_RESTART_COUNT") or 0) + 1
    pathlib.Path(__file__).with_name(f"start-{start}").touch()
    if start <= 2:
        time.sleep(100)
"""


def unheard(cluster, tiny, _):
    """A job that is warned twice before its ranks listen, by either signal: (job, run)."""
    config, run = tiny("unheard")
    python = run.parent / "late"
    python.mkdir(parents=True)
    (python / "sitecustomize.py").write_text(LATE)
    path = os.pathsep.join([str(python), str(ROOT), cluster.env["PYTHONPATH"]])
    job = cluster.submit(config, *WORDS, options=("--nodelist=node[3-4]",), PYTHONPATH=path)
    for start, name in enumerate(("USR2", "TERM"), 1):
        until((python / f"start-{start}").exists, cluster, job)
        cluster.run("scancel", f"--signal={name}", job)
    cluster.ended(job)
    return job, run


def evaluated(cluster, _, run):
    """A job that measures a run and was told to stop while it did: its id."""
    words = (
        run,
        run.parents[1] / "data" / "test",
        "--",
        "--attacks",
        "apgd-ce",
        "--iters",
        "100",
        "--batch-size",
        "2",
        "--device",
        "cpu",
    )
    job = cluster.submit(*words, options=("--array=0", "--nodelist=node[3-4]"), script=ROOT / "slurm" / "evaluate.sh")
    until(lambda: len(measuring(run)) == 2, cluster, job)
    os.kill(
        measuring(run)[0], signal.SIGUSR2
    )  # straight to a rank: scancel may take longer than the rest of the evaluation
    cluster.ended(job)
    return job


# What the ranks of an evaluation run first: every question to the model takes 1.2 s, and an operation of their group
# times out after 20 s, as after half an hour on a real cluster.
SLOW = """
import sys
from datetime import timedelta

if sys.orig_argv[1:4] == ["-m", "mmtard", "evaluate"]:
    import time
    from mmtard.distributed import ranks
    from mmtard.evaluation import model

    ranks.start.__defaults__ = ("auto", timedelta(seconds=20))
    logits = model.EvaluatedModel.logits

    def slow(self, head):
        ask = logits(self, head)
        return lambda images: time.sleep(1.2) or ask(images)

    model.EvaluatedModel.logits = slow
"""


def outlasted(cluster, _, run):
    """A job whose only chunk takes as long as its time limit, six times the signal's lead: (id, its results, others).

    All samples stand to the end. One of the two ranks has nothing to do but wait. The others: of the same evaluation,
    undisturbed.
    """
    folder = cluster.folder / "outlasted"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SLOW)
    means = ["--attacks", "apgd-ce", "--iters", "90", "--eps", "1/25500", "--device", "cpu", "--workers", "0"]
    data, python = run.parents[1] / "data" / "test", sys.executable
    cluster.run(
        python, "-m", "mmtard", "evaluate", run, "--data", data, *means, "--out", folder / "undisturbed"
    )  # fmt: skip
    path = os.pathsep.join([str(folder), str(ROOT), cluster.env["PYTHONPATH"]])
    options = ("--array=0", "--nodelist=node[3-4]", "--time=2", "--signal=USR2@20")
    words = (run, data, "--", *means, "--out", folder / "out")
    job = cluster.submit(*words, options=options, script=ROOT / "slurm" / "evaluate.sh", PYTHONPATH=path)
    cluster.ended(job, limit=600)
    return job, folder / "out", folder / "undisturbed"


def measuring(run):
    """The ranks that evaluate a run and have started their loaders."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            # srun has these words after its own; a loader has its rank's, and no children.
            if (
                words[1:4] == [b"-m", b"mmtard", b"evaluate"]
                and str(run).encode() in words
                and (path / "task" / path.name / "children").read_text()
            ):
                found.append(int(path.name))
        except OSError:
            pass  # it ended meanwhile
    return found


def test_whatever_is_done_to_a_job_its_run_loses_no_checkpoint_and_ends_undisturbed(cluster, jobs, undisturbed):
    job, run, published = jobs["disturbed"].result()
    fields, log = cluster.job(job), cluster.log(job)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "6"), log
    starts = history.read(run)
    assert [(s["job"], s["restart"]) for s in starts] == [(job, n) for n in range(7)]
    assert all(s["step"] >= step for s, step in zip(starts[1:], published)), (starts, published)
    kinds = [history.end_kind(s) for s in starts]
    assert kinds[0] == history.PREEMPTED and starts[0]["end"]["step"] == starts[1]["step"], (
        log
    )  # warned, it lost no step
    assert kinds[1] in (history.PREEMPTED, history.LOST)  # by scontrol: Slurm may not have left it the time to save
    assert kinds[2:] == [history.PREEMPTED, history.LOST, history.PREEMPTED, history.LOST, history.COMPLETE]
    failed = starts[5]["end"]["reason"]
    assert failed.startswith("rank 1, step ") and failed in log, failed
    assert f": a GPU of {socket.gethostname()} failed: CUDA error: uncorrectable ECC error encountered" in failed
    assert (cluster.folder / "urgent.log").read_text()
    assert all(s["end"]["time"] <= later["time"] for s, later in zip(starts, starts[1:]) if s.get("end"))
    assert "lost rank 1 (" in starts[3]["end"]["reason"] and starts[3]["end"]["reason"] in log
    for start, noted in enumerate(starts, 1):  # the log keeps every start, and each has a file of its own
        own = (cluster.folder / f"mmtard-vitb32-{job}-start{start}.log").read_text()
        assert (
            re.search(rf"step +{noted['step'] + 1}/", own)
            and f"start {start} on node[1-2]" in log
            and own.splitlines()[-1] in log
        )
    assert losses(run) == losses(undisturbed[0])
    assert state(run) == "complete"


def test_a_lost_node_costs_no_more_than_a_restart(cluster, jobs, undisturbed):
    job, run = jobs["deserted"].result()
    fields, log = cluster.job(job), cluster.log(job)
    first, second, *more = history.read(run)
    # What srun told the lost node about the step's end, Slurm may deliver when it is back: to the next start, whose
    # step has that number, and which may not have been noted yet.
    unnoted = log.count(": start ") - len(history.read(run))
    assert fields["JobState"] == "COMPLETED" and int(fields["Restarts"]) == 1 + len(more) + unnoted <= 2, log
    assert history.end_kind(first) == history.LOST and "lost rank 1 (" in history.end_reason(first), log
    kinds = [history.end_kind(s) for s in (second, *more)]
    assert (
        second["step"] >= 2 and kinds[-1] == history.COMPLETE and set(kinds[:-1]) <= {history.PREEMPTED, history.LOST}
    )
    assert losses(run) == losses(undisturbed[0])


def test_forbidden_requeue_a_bound_and_another_number_of_nodes(cluster, jobs, undisturbed):
    (first, second, third), run, (waiting, handed) = jobs["moved"].result()
    log = cluster.log(first)  # the second job goes on in the first one's log
    assert log.count("submitted again") == 1 and log.count("start 2 on") == 1
    assert handed == f"afterok:{second}(unfulfilled)" and (run / "goes_on_as").read_text() == f"{first} {second}\n"
    assert cluster.job(waiting)["JobState"] == "PENDING"  # since the second job did not end well
    cluster.run("scancel", waiting)
    fields = cluster.job(second)
    assert (fields["ExitCode"], fields["Requeue"], fields["NumNodes"]) == ("1:0", "0", "2"), log
    assert "2 starts ended as preempted" in log and "resume.max_preemptions allows 1, raise it to go on" in log
    assert cluster.job(third)["JobState"] == "COMPLETED", cluster.log(third)
    starts = history.read(run)
    assert [(s["job"], s["world_size"]) for s in starts] == [(first, 2), (second, 2), (third, 1)]
    assert [s["step"] for s in starts[1:]] == [s["end"]["step"] for s in starts[:-1]]
    ours, theirs = losses(run), losses(undisturbed[0])
    assert [row["batch"] for row in ours] == [row["batch"] for row in theirs]
    # One rank sums a batch in another order than two, and 24 attack steps make more of the last bits.
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=1e-3)


def test_a_time_limit_shorter_than_the_work_only_interrupts_it(cluster, jobs, undisturbed):
    job, run = jobs["limited"].result()
    fields, log = cluster.job(job), cluster.log(job)
    # On a busy host the warning may come before the ranks listen.
    unheard = log.count("training ended with status 140")
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", str(1 + unheard)), log
    stopped, last = history.read(run)
    assert (history.end_kind(stopped), history.end_kind(last)) == (history.TIMEOUT, history.COMPLETE)
    assert stopped["end"]["reason"].startswith("stopped by SIGUSR2 after step ")
    assert losses(run) == losses(undisturbed[0])


def test_a_job_that_is_warned_before_its_ranks_listen_starts_again(cluster, jobs):
    job, run = jobs["unheard"].result()
    fields, log = cluster.job(job), cluster.log(job)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "2"), log
    assert "training ended with status 140" in log and "training ended with status 143" in log
    (start,) = history.read(run)
    assert (start["restart"], history.end_kind(start)) == (2, history.COMPLETE)


def test_an_interrupted_evaluation_goes_on_and_leaves_one_result(cluster, jobs, undisturbed):
    job = jobs["evaluated"].result()
    fields, log = cluster.job(job), cluster.log(job)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), log
    assert log.count("what is measured is kept in") == 2 and "stopped by SIGUSR2" in log
    (result,) = (undisturbed[0] / "evaluations").iterdir()
    (dataset,) = json.loads((result / "results.json").read_text())["datasets"]
    assert dataset["clean"]["n"] == 40 and not (result / "partial").exists()


def test_an_evaluation_whose_chunk_outlasts_its_jobs_ends_with_the_numbers_of_an_undisturbed_one(cluster, jobs):
    """Each start goes on within the chunk; the rank that waits for it is not taken for hung."""
    job, *outs = jobs["outlasted"].result()
    fields, log = cluster.job(job), cluster.log(job)
    assert fields["JobState"] == "COMPLETED" and int(fields["Restarts"]) >= 1, log
    assert "stopped by SIGUSR2; what is measured is kept in" in log and "lost the connection" not in log
    ours, theirs = (json.loads((out / "results.json").read_text())["datasets"][0] for out in outs)
    for entry in (ours, theirs):
        for at in entry["eps"].values():
            assert at["robust"]["accuracy"] == entry["clean"]["accuracy"] > 0, "all stood to the end"
            at["attacks"]["apgd-ce"].pop("seconds")
    assert ours == theirs and not (outs[0] / "partial").exists()


def test_a_hang_ends_the_job_within_the_limit_and_past_its_bound_for_good(cluster, tiny):
    config, run = tiny("hung", **LONG, resume={"watchdog_minutes": 0.1, "max_losses": 0})
    job = cluster.submit(config, *WORDS)
    until(lambda: begun(run, 1, 2), cluster, job)
    os.kill(process(run, 1), signal.SIGSTOP)
    began = time.monotonic()
    fields = cluster.ended(job)
    assert time.monotonic() - began < 6 + 20  # the limit, and what Slurm takes to end a stopped process
    assert (fields["JobState"], fields["Restarts"]) == ("FAILED", "0"), cluster.log(job)
    assert (
        "no progress in its" in cluster.log(job)
        and "rank 1 (" in cluster.log(job)
        and "did not arrive" in cluster.log(job)
    )
    assert "resume.max_losses allows 0, raise it to go on" in cluster.log(job)
    assert state(run).startswith("failed: 1 starts ended as lost")


def test_preflight_passes_over_two_nodes(cluster, tiny):
    config, _ = tiny("preflight")
    job = cluster.submit(config, script=ROOT / "slurm" / "preflight.sh")
    fields = cluster.ended(job)
    log = cluster.log(job)
    verdicts = [line.split()[1:3] for line in log.splitlines() if " PASS " in line or " FAIL " in line]
    assert fields["JobState"] == "COMPLETED", log
    assert verdicts == [
        ["PASS", f"{name}:"] for name in ("versions", "devices", "network", "models", "folder", "limits", "shards")
    ]
