"""What the scripts start, and whether they start it again, with stand-ins for Slurm's commands and the ranks."""

import json
import os
import subprocess

import pytest

from .conftest import ROOT

# `state` has the answers to be given about the job, one a line, of which the last stays; "busy" is none.
SCONTROL = r"""#!/bin/bash
cd "$(dirname "$0")"
case "$*" in
    "show hostnames"*) echo node1 ;;
    "show node"*) echo "NodeName=node1 NodeAddr=127.0.0.1 Port=1" ;;
    "show job"*)
        [ "$(head -1 state)" != busy ] || { echo "slurm_load_jobs error: Socket timed out" >&2; exit 1; }
        shown="JobId=7 JobState=$(head -1 state) Requeue=$(cat requeue)"
        echo "$shown StdOut=$PWD/job.log TimeLimit=1:00 OverSubscribe=NO" ;;
    requeue*)
        echo "$*" >>requeued
        [ "$(wc -l <requeued)" -gt "$(cat refusals)" ] ;;
esac
"""
SRUN = r"""#!/bin/bash
cd "$(dirname "$0")"
echo "${@:3}" >>ran
echo "0: step 1"
[ ! -f said ] || cat said >&2
[ ! -f ends ] || { mkdir -p run && cat ends >run/resume.jsonl; }
exit "$(cat status)"
"""


@pytest.fixture
def script(tmp_path, tree, write, warm_python):
    """Call with a script, its words and the status of srun, whose ranks note `end`: the finished process."""
    write(tree)
    sbatch = '#!/bin/sh\necho "$@" >>"$(dirname "$0")/submitted"\necho 8\n'
    for name, text in {"scontrol": SCONTROL, "srun": SRUN, "sbatch": sbatch}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "python").symlink_to(warm_python)
    (tmp_path / "sitecustomize.py").write_text("import time\ntime.sleep = lambda seconds: None\n")

    def call(name, *words, status=0, end=None, state="RUNNING", requeue=1, refusals=0, **env):
        for file, content in {"status": status, "state": state, "requeue": requeue, "refusals": refusals}.items():
            (tmp_path / file).write_text(f"{content}\n")
        (tmp_path / "ends").write_text(ended(end))
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MMTARD_"))}
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "x", "SLURM_JOB_NODELIST": "node1", "SLURM_JOB_NUM_NODES": "1"}
        own = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "PYTHONPATH": f"{tmp_path}:{ROOT}",
        }
        return subprocess.run(
            ["bash", f"slurm/{name}", *map(str, words)],
            cwd=ROOT,
            env=clean | job | own | env,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return call


def ended(kind):
    """The history of a run whose only start, of job 7, ended so; None: it noted no end."""
    return json.dumps({"step": 0, "job": "7", "restart": 0, "end": kind and {"kind": kind, "reason": "why"}}) + "\n"


def noted(path):
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize(
    "name, command", [("preflight.sh", "preflight"), ("cache.sh", "cache"), ("train_vitb32.sh", "train")]
)
def test_settings_alone_are_those_of_the_default_configuration(script, tmp_path, name, command):
    run, settings = f"run_dir={tmp_path / 'run'}", f"data.shards={tmp_path / 'shards'}"
    assert script(name, settings, run).returncode == 0
    assert script(name, tmp_path / "run.yaml", "train.lr=1e-5").returncode == 0
    assert script(name, run, MMTARD_CONFIG=str(tmp_path / "run.yaml")).returncode == 0
    # Of the default configuration, a training stores the clean teacher's embeddings first.
    first = ["cache", "train"] if command == "train" else [command]
    assert noted(tmp_path / "ran") == [
        *(f"python -m mmtard {part} configs/vitb32_mmtard.yaml {settings} {run}" for part in first),
        f"python -m mmtard {command} {tmp_path / 'run.yaml'} train.lr=1e-5",
        f"python -m mmtard {command} {tmp_path / 'run.yaml'} {run}",
    ]


@pytest.mark.parametrize("status", [75, 130, 137])
@pytest.mark.parametrize("end, again", [("failed", False), ("stopped", False), ("lost", True), (None, True)])
def test_a_run_that_failed_or_that_a_person_stopped_is_not_started_again_whatever_ended_the_ranks(
    script, tmp_path, status, end, again
):
    done = script("train_vitb32.sh", tmp_path / "run.yaml", status=status, end=end)
    assert done.returncode == status
    assert noted(tmp_path / "requeued") == ["requeue 7"] * again, done.stdout
    assert (f"this start ended as {end}: why; it is not repeated by itself" in done.stderr) != again


TASKS = "srun: error: node{}: task{}: {}\n".format


@pytest.mark.parametrize(
    "status, said, again",
    [
        (140, "", True),  # of an srun that was told to be quiet
        (140, TASKS("[1-2]", "s 0-1", "User defined signal 2"), True),
        (143, TASKS(1, " 0", "Terminated") + TASKS(2, " 1", "Killed"), True),
        (137, TASKS(1, " 0", "Exited with exit code 143") + TASKS(2, " 1", "Killed"), True),  # behind a shell
        (143, "", False),
        (137, TASKS(1, " 0", "Exited with exit code 1") + TASKS(2, " 1", "Killed"), False),
        (140, TASKS(1, " 0", "Exited with exit code 2") + TASKS(2, " 1", "User defined signal 2"), False),
        (143, TASKS(1, " 0", "Segmentation fault (core dumped)") + TASKS(2, " 1", "Terminated"), False),
        (139, TASKS(1, " 0", "Segmentation fault"), False),
    ],
)
def test_ranks_that_a_signal_from_outside_ended_before_the_start_was_noted_are_started_again(
    script, tmp_path, status, said, again
):
    (tmp_path / "said").write_text(said)
    log = tmp_path / "job-start9.log"  # with what another job left there
    log.write_text(TASKS(1, " 0", "Exited with exit code 1"))
    done = script("train_vitb32.sh", tmp_path / "run.yaml", status=status, end="timeout", SLURM_RESTART_COUNT="8")
    assert done.returncode == status and log.read_text().endswith(said)
    assert bool(noted(tmp_path / "requeued")) == again, done.stderr
    assert ("this start ended before the run's folder was prepared" in done.stderr) != again


def test_starts_that_signals_ended_are_repeated_within_a_bound_whatever_came_before(script, tmp_path):
    """As other jobs, too. The history has the first start of another job alone."""
    jobs = [{"SLURM_JOB_ID": "8"}, {"SLURM_JOB_ID": "9"}, {"SLURM_JOB_ID": "9", "SLURM_RESTART_COUNT": "7"}]
    for number, job in enumerate([*jobs, {"SLURM_JOB_ID": "10"}], 1):
        done = script("train_vitb32.sh", tmp_path / "run.yaml", status=140, end="timeout", **job)
        # The third is one too many; the fourth was submitted by a person.
        assert len(noted(tmp_path / "requeued")) == min(number, 2) + (number == 4), done.stderr
        told = "a signal ended 3 starts in a row before the run's folder was prepared" in done.stderr
        assert told == (number == 3)


@pytest.mark.parametrize("end", ["failed", "stopped"])
def test_a_run_that_failed_or_was_stopped_starts_when_a_person_submits_it_anew(script, tmp_path, end):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "resume.jsonl").write_text(ended(end))
    assert script("train_vitb32.sh", tmp_path / "run.yaml", end="complete", SLURM_JOB_ID="9").returncode == 0
    assert noted(tmp_path / "ran")


@pytest.mark.parametrize("name, words", [("evaluate.sh", ("runs/b32", "data")), ("cache.sh", ("seed=1",))])
@pytest.mark.parametrize("status, again", [(75, True), (130, False), (137, True)])
def test_an_evaluation_or_a_storing_that_a_person_stopped_is_not_started_again(
    script, tmp_path, name, words, status, again
):
    done = script(name, *words, status=status)
    assert done.returncode == status
    assert noted(tmp_path / "requeued") == ["requeue 7"] * again, done.stdout


@pytest.mark.parametrize(
    "state, again",
    [("RUNNING", True), ("SIGNALING", True), ("busy", True), ("CANCELLED", False), ("COMPLETING", False)],
)
def test_a_job_that_may_still_run_goes_back_to_the_queue(script, tmp_path, state, again):
    done = script("train_vitb32.sh", tmp_path / "run.yaml", status=75, end="preempted", state=state)
    assert noted(tmp_path / "requeued") == ["requeue 7"] * again, done.stdout
    assert "0: step 1\n" in done.stdout
    assert (tmp_path / "job-start1.log").exists() == (state != "busy")
    assert (f"is {state}, and is not started again from here" in done.stdout) != again


@pytest.mark.parametrize("refusals, tries", [(2, 3), (9, 3)])
def test_a_requeue_that_the_controller_does_not_take_is_tried_again(script, tmp_path, refusals, tries):
    done = script("train_vitb32.sh", tmp_path / "run.yaml", status=75, end="preempted", refusals=refusals)
    assert noted(tmp_path / "requeued") == ["requeue 7"] * tries
    assert ("could not go back to the queue; the same sbatch command goes on from the saved state" in done.stdout) == (
        refusals >= tries
    )


def test_a_job_that_may_not_be_requeued_is_submitted_again(script, tmp_path):
    script("train_vitb32.sh", tmp_path / "run.yaml", status=75, end="preempted", requeue=0)
    (submitted,) = noted(tmp_path / "submitted")
    assert "--dependency=afterany:7 --no-requeue" in submitted and not noted(tmp_path / "requeued")
