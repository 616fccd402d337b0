"""Submitted work that really trains: on this machine, and over two nodes of a throwaway Slurm."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from processes import python_path, without_extras

from mmtard.runs.metrics import TIMINGS

SUBMIT = Path(__file__).parents[2] / "launch" / "submit.py"
TWO_NODES = ("--nodes=2", "--gpus-per-node=1", "--cpus-per-task=1", "log.every=1")
ONE_NODE = ("--nodes=1", *TWO_NODES[1:])
pytestmark = pytest.mark.slow


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(run):
    """metrics.jsonl without the times."""
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows(run / "metrics.jsonl")]


def jobs_of(run):
    """The folder of the logs and results of the run's one submission."""
    (folder,) = (run / "submissions").iterdir()
    return folder / "jobs"


def test_local_trains_here_on_two_ranks_with_the_copied_code(tiny):
    config, run = tiny("local")
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")} | {"OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = python_path(without_extras(config.parent / "local"))
    command = [sys.executable, SUBMIT, "--config", config, "--local", "--gpus-per-node=2", "log.every=1"]
    done = subprocess.run(command, env=env, cwd=config.parent, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "2 processes here" in done.stdout and "step 6/6" in done.stdout
    assert [row["step"] for row in rows(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert rows(run / "resume.jsonl")[0]["world_size"] == 2
    assert json.loads((run / "environment.json").read_text())["command"].startswith(
        f"{jobs_of(run).parent}/code/mmtard/"
    )
    again = subprocess.run(command, env=env, cwd=config.parent, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0 and again.stdout.endswith("# nothing is left to do\n")


@pytest.fixture(scope="module")
def jobs(cluster, tiny):
    """These submissions at once, since each mostly waits: name -> what became of it."""
    with ThreadPoolExecutor() as lanes:
        yield {
            story.__name__: lanes.submit(story, cluster, *tiny(story.__name__))
            for story in (followed, told, bereft, alone, interrupted, unloaded)
        }


def followed(cluster, config, run):
    """A followed job over two nodes that nobody disturbs: (what was printed, its run folder)."""
    return cluster.run(sys.executable, SUBMIT, "--config", config, *TWO_NODES, "--follow"), run


def told(cluster, config, run):
    """A job that may not be requeued and is told to stop, and an evaluation that waits: (what was printed, run)."""
    test = run.parents[1] / "data" / "test"
    words = (SUBMIT, "--config", config, *TWO_NODES, "--slurm", "no-requeue", "--evaluate", test, "--follow")
    with ThreadPoolExecutor() as lane:
        printed = lane.submit(cluster.run, sys.executable, *words)
        until(lambda: (run / "start").exists(), printed)
        (log,) = jobs_of(run).glob("*_0_log.out")
        cluster.run("scancel", "--signal=USR2", log.name.partition("_")[0])
        return printed.result(), run


def bereft(cluster, config, run, shape=TWO_NODES, rank=1):
    """A job one rank of which is killed: (its fields at the end, its run folder)."""
    job = re.search(r"job (\d+): training", cluster.run(sys.executable, SUBMIT, "--config", config, *shape))[1]
    until(lambda: (run / "start").exists())
    (killed,) = (
        p
        for p in ranks_of(run, "train")
        if f"SLURM_PROCID={rank}".encode() in (p / "environ").read_bytes().split(b"\0")
    )
    os.kill(int(killed.name), signal.SIGKILL)
    until(lambda: cluster.job(job)["JobState"] != "RUNNING", limit=60)  # a lost rank costs a minute at most
    return cluster.ended(job), run


def alone(cluster, config, run):
    """As `bereft`, and there was no other rank."""
    return bereft(cluster, config, run, ONE_NODE, rank=0)


def interrupted(cluster, config, run):
    """A job that a person interrupts (`scancel --signal=INT`): (its fields at the end, its run folder)."""
    job = at_work(cluster, config, run)
    cluster.run("scancel", "--signal=INT", job)
    return cluster.ended(job), run


def unloaded(cluster, config, run):
    """A job of one rank whose loader is killed, as where memory runs out: (its fields at the end, its run folder)."""
    job = at_work(cluster, config, run)
    (rank,) = ranks_of(run, "train")
    children = (rank / "task" / rank.name / "children").read_text().split()
    words = (rank / "cmdline").read_bytes()
    loaders = [int(pid) for pid in children if Path(f"/proc/{pid}/cmdline").read_bytes() == words]
    os.kill(loaders[-1], signal.SIGKILL)
    return cluster.ended(job), run


def at_work(cluster, config, run):
    """The id of a job of one rank that has done some of its many steps."""
    longer = ("train.steps=24", "attack.steps=24", "checkpoint.every=2")
    submitted = cluster.run(sys.executable, SUBMIT, "--config", config, *ONE_NODE, *longer)
    until(lambda: (run / "metrics.jsonl").exists() and len(rows(run / "metrics.jsonl")) >= 3)
    return re.search(r"job (\d+): training", submitted)[1]


def until(condition, printed=None, limit=200.0):
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end and not (printed and printed.done()), printed and printed.result()
        time.sleep(0.05)


def test_a_submitted_job_trains_over_two_nodes_to_the_end(jobs):
    printed, run = jobs["followed"].result()
    job = re.search(r"job (\d+): training", printed)[1]
    assert "step 6/6" in printed and printed.endswith(f"-- job {job} (followed) is COMPLETED\n")
    assert [row["step"] for row in rows(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert (run / "checkpoints" / "latest").resolve().name == "step-6"
    assert [(start["step"], start["world_size"]) for start in rows(run / "resume.jsonl")] == [(0, 2)]
    for rank in (0, 1):
        assert pickle.loads((jobs_of(run) / f"{job}_{rank}_result.pkl").read_bytes()) == ("success", 0)
    assert json.loads((run / "environment.json").read_text())["command"].startswith(
        f"{jobs_of(run).parent}/code/mmtard/"
    )


def test_where_requeue_is_forbidden_another_job_goes_on_and_what_waits_waits_for_that(cluster, jobs):
    printed, run = jobs["told"].result()
    job, evaluation = re.findall(r"^job (\d+): ", printed, re.MULTILINE)
    ((then,),) = [re.findall(rf"job {job}: may not be requeued; submitted again as job (\d+)", printed)]
    first, second = rows(run / "resume.jsonl")
    assert (
        (first["job"], second["job"]) == (job, then) and 0 < second["step"] < 6 and first["end"]["kind"] == "preempted"
    )
    assert losses(run) == losses(jobs["followed"].result()[1])
    assert (cluster.job(job)["JobState"], cluster.job(then)["JobState"]) == ("FAILED", "COMPLETED")
    # The log goes on in the first job's file, and who follows is told.
    assert (
        f"-- told goes on as job {then}\n" in printed
        and f"-- job {then} (told) is COMPLETED\n" in printed
        and "step 6/6" in printed
    )
    assert (
        "start 2 on node" in (jobs_of(run) / f"{job}_0_log.out").read_text()
        and not (jobs_of(run) / f"{then}_0_log.out").exists()
    )
    waited = cluster.job(evaluation)
    assert waited["JobState"] == "COMPLETED" and waited["StartTime"] >= cluster.job(then)["EndTime"], printed
    assert list((run / "evaluations").iterdir())
    assert pickle.loads((jobs_of(run) / f"{then}_0_result.pkl").read_bytes()) == ("success", 0)


def test_a_killed_rank_costs_no_more_than_one_restart_in_the_queue(jobs):
    fields, run = jobs["bereft"].result()
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), next(
        jobs_of(run).glob("*_0_log.out")
    ).read_text()
    assert losses(run) == losses(jobs["followed"].result()[1])
    (log,) = jobs_of(run).glob("*_0_log.out")
    assert log.read_text().count("goes back to the queue") == 1 and "start 2 on node" in log.read_text()


def test_a_killed_rank_that_was_the_only_one_costs_no_more(jobs):
    fields, run = jobs["alone"].result()
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), next(
        jobs_of(run).glob("*_0_log.out")
    ).read_text()
    assert [start.get("end", {}).get("kind") for start in rows(run / "resume.jsonl")] == [None, "complete"]


def test_a_person_who_interrupts_a_job_keeps_what_is_done_and_nothing_starts_it_again(jobs):
    fields, run = jobs["interrupted"].result()
    (log,) = jobs_of(run).glob("*_0_log.out")
    (start,) = rows(run / "resume.jsonl")
    assert (fields["JobState"], fields["Restarts"]) == ("FAILED", "0"), log.read_text()
    assert start["end"]["kind"] == "stopped" and start["end"]["reason"].startswith("stopped by SIGINT after step ")
    assert (run / "checkpoints" / "latest").resolve().name == f"step-{start['end']['step']}"
    assert "this start ended as stopped" in log.read_text()


def test_a_killed_loader_costs_no_more_than_a_killed_rank(jobs):
    fields, run = jobs["unloaded"].result()
    (log,) = jobs_of(run).glob("*_0_log.out")
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), log.read_text()
    first, second = rows(run / "resume.jsonl")
    assert (first["end"]["kind"], second["end"]["kind"]) == ("lost", "complete")


def test_a_killed_evaluation_is_measured_in_the_next_start(cluster, jobs, tiny):
    _, run = jobs["followed"].result()
    words = ("--config", run.parents[1] / "followed.yaml", *TWO_NODES, "--evaluate", run.parents[1] / "data" / "test")
    job = re.search(r"job (\d+): evaluation", cluster.run(sys.executable, SUBMIT, *words))[1]
    until(lambda: list(ranks_of(run, "evaluate")))
    os.kill(int(next(ranks_of(run, "evaluate")).name), signal.SIGKILL)
    fields = cluster.ended(job)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1")
    assert list((run / "evaluations").rglob("results.json"))


def test_a_pipeline_skips_the_teacher_that_is_done_stores_its_embeddings_and_trains_a_sweep_as_an_array(
    cluster, jobs, tiny
):
    teacher = jobs["followed"].result()[1]
    config, run = tiny(
        "piped", method={"name": "rslad"}, teachers={"robust": {"weights": str(teacher), "stored": True}}
    )
    (config.parent / "teachers").mkdir()
    (config.parent / "teachers" / "followed.yaml").write_text((config.parent / "followed.yaml").read_text())
    command = (
        sys.executable,
        SUBMIT,
        "--config",
        config,
        *ONE_NODE,
        "--pipeline",
        "--array",
        "seeds=0,1",
        "--evaluate",
        run.parents[1] / "data" / "test",
    )
    printed = cluster.run(*command, "--follow")
    assert f"# teacher robust is complete: {teacher}\n" in printed
    stages = re.findall(r"^job (\S+): (\w+)", printed, re.MULTILINE)
    assert [title for _, title in stages] == ["stored", "training", "training", "evaluation", "evaluation"]
    (stored, _), (first, _), (second, _), *_ = stages
    assert (first, second) == (f"{first.partition('_')[0]}_0", f"{first.partition('_')[0]}_1")
    found = [cluster.job(job) for job, _ in stages]
    assert {fields["JobState"] for fields in found} == {"COMPLETED"}, printed
    assert found[1]["StartTime"] >= found[0]["EndTime"] and found[3]["StartTime"] >= found[1]["EndTime"]
    manifest = json.loads(next((run.parents[1] / "data" / "train" / "embeddings").glob("*/manifest.json")).read_text())
    assert manifest
    runs = [run / f"seed={seed}" for seed in (0, 1)]
    assert [len(rows(r / "metrics.jsonl")) for r in runs] == [6, 6] and losses(runs[0]) != losses(runs[1])
    assert all(list((r / "evaluations").rglob("*.json")) for r in runs)
    again = cluster.run(*command)
    assert "nothing is left to do" in again and "job " not in again


def ranks_of(run, command):
    """The processes of a submitted job that run this command of mmtard on this run, without their loader processes."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            parent = re.search(r"PPid:\s+(\d+)", (path / "status").read_text())[1]
            by_submitit = b"submitit.core._submit" in (Path("/proc") / parent / "cmdline").read_bytes().split(b"\0")
        except (OSError, TypeError):
            continue
        if by_submitit and words[1:4] == [b"-m", b"mmtard", command.encode()] and os.fsencode(run) in words[4]:
            yield path
